//! Names the reference's source file, which stays where it is.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=MOE_FAST_REFERENCE");
    let source = env::var("MOE_FAST_REFERENCE").expect("MOE_FAST_REFERENCE is the source file");
    let source = fs::canonicalize(source).expect("MOE_FAST_REFERENCE is an existing file");
    let module = format!("#[path = {source:?}]\nmod reference;\n");
    let out = env::var("OUT_DIR").expect("set by cargo");
    fs::write(Path::new(&out).join("reference.rs"), module).expect("OUT_DIR is writable");
}
