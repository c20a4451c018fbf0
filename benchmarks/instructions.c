/* A plugin of QEMU (its user mode, version 7 on): counts the instructions of a process, and prints
   how many it has run whenever a system call has MARK for its first argument, as close(MARK) has.

   What it uses of qemu-plugin.h is declared here, as distributions do not ship that header. */

#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_info_t;
typedef void (*TranslateCallback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*SystemCallCallback)(
    qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
    uint64_t, uint64_t
);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, TranslateCallback);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, SystemCallCallback);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
/* Operation 0 adds to a variable. */
void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *, int operation, void *variable, uint64_t addend
);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;
#define MARK 0x5EED5EED
static uint64_t count;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &count, qemu_plugin_tb_n_insns(block));
}

static void called(
    qemu_plugin_id_t id, unsigned thread, int64_t number, uint64_t first, uint64_t a2, uint64_t a3,
    uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8
) {
    (void)id, (void)thread, (void)number, (void)a2, (void)a3, (void)a4;
    (void)a5, (void)a6, (void)a7, (void)a8;
    if (first == MARK)
        fprintf(stderr, "%" PRIu64 "\n", count);
}

__attribute__((visibility("default"))) int
qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
