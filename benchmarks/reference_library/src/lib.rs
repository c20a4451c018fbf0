//! The reference behind a C interface. `build.rs` writes where its source file lies.

#![allow(dead_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed};

/// What the reference takes from the library around it.
mod error {
    #[derive(Debug)]
    pub enum AprenderError {
        FormatError { message: String },
    }
    pub type Result<T> = std::result::Result<T, AprenderError>;
}

include!(concat!(env!("OUT_DIR"), "/reference.rs"));
use reference::{MoeConfig, MoeConstructionPlan, RouterInit};

/// Keeps the last large block for the next request of its size, so that the reference, which
/// returns a new vector each time, is measured without the system handing out fresh pages.
struct Reusing;

const LARGE: usize = 1 << 20;
static KEPT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static KEPT_SIZE: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Reusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE && layout.size() == KEPT_SIZE.load(Relaxed) {
            let kept = KEPT.swap(std::ptr::null_mut(), Relaxed);
            if !kept.is_null() {
                return kept;
            }
        }
        System.alloc(layout)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() < LARGE {
            return System.dealloc(block, layout);
        }
        let previous = KEPT.swap(block, Relaxed);
        let size = KEPT_SIZE.swap(layout.size(), Relaxed);
        if !previous.is_null() {
            System.dealloc(previous, Layout::from_size_align_unchecked(size, layout.align()));
        }
    }
}

#[global_allocator]
static ALLOCATOR: Reusing = Reusing;

/// Makes the weights, copies them to `copy` unless that is null, and drops them.
///
/// # Safety
/// `copy` is null or has room for `hidden_dim * num_experts` values.
#[no_mangle]
pub unsafe extern "C" fn gate_weights(
    hidden_dim: usize,
    num_experts: usize,
    init: u32,
    copy: *mut f64,
) {
    let init = match init {
        0 => RouterInit::Random,
        1 => RouterInit::Uniform,
        _ => RouterInit::Balanced,
    };
    let weights = black_box(reference::compute_gate_weights(hidden_dim, num_experts, init));
    if !copy.is_null() {
        copy.copy_from_nonoverlapping(weights.as_ptr(), weights.len());
    }
}

fn plan_of(num_models: usize, num_layers: usize, num_experts: usize) -> MoeConstructionPlan {
    let config = MoeConfig { num_experts, num_experts_per_tok: 1, ..MoeConfig::default() };
    reference::plan_moe_construction(num_models, num_layers, &config).expect("a valid plan")
}

/// Makes a plan and drops it.
#[no_mangle]
pub extern "C" fn plan(num_models: usize, num_layers: usize, num_experts: usize) {
    black_box(plan_of(num_models, num_layers, num_experts));
}

/// Makes a plan that is kept until the process ends.
#[no_mangle]
pub extern "C" fn kept_plan(
    num_models: usize,
    num_layers: usize,
    num_experts: usize,
) -> *const MoeConstructionPlan {
    Box::into_raw(Box::new(plan_of(num_models, num_layers, num_experts)))
}

/// # Safety
/// `plan` is from `kept_plan`.
#[no_mangle]
pub unsafe extern "C" fn load_balance(plan: *const MoeConstructionPlan) -> f64 {
    reference::compute_expert_load_balance(&(*plan).assignments)
}
