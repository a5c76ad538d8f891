//! Declarations of `csrc/dist/`.

use std::ffi::{c_char, c_void};

use torch_sys::C_tensor;

unsafe extern "C" {
    pub(crate) fn vora_store_new(host: *const c_char, port: u16, is_server: i32, timeout_ms: i64) -> *mut c_void;
    pub(crate) fn vora_store_within(store: *mut c_void, prefix: *const c_char) -> *mut c_void;
    pub(crate) fn vora_store_free(store: *mut c_void);
    pub(crate) fn vora_store_set(store: *mut c_void, key: *const c_char, data: *const u8, len: usize) -> i32;
    pub(crate) fn vora_store_has(store: *mut c_void, key: *const c_char) -> i32;
    pub(crate) fn vora_store_get(store: *mut c_void, key: *const c_char) -> *mut C_tensor;
    pub(crate) fn vora_store_swap(
        store: *mut c_void,
        key: *const c_char,
        expected: *const c_char,
        desired: *const c_char,
    ) -> *mut C_tensor;
    pub(crate) fn vora_group_new(
        store: *mut c_void,
        rank: i32,
        world_size: i32,
        interface: *const c_char,
        host: *const c_char,
        timeout_ms: i64,
    ) -> *mut c_void;
    pub(crate) fn vora_group_attach_nccl(
        group: *mut c_void,
        store: *mut c_void,
        attach: *mut c_void,
        device: i32,
        timeout_ms: i64,
    ) -> i32;
    pub(crate) fn vora_group_connect_nccl(group: *mut c_void, device: i32) -> i32;
    pub(crate) fn vora_group_is_broken(group: *mut c_void) -> i32;
    pub(crate) fn vora_group_free(group: *mut c_void);
    pub(crate) fn vora_group_all_reduce(group: *mut c_void, tensor: *const C_tensor, op: i32) -> i32;
    pub(crate) fn vora_group_broadcast(group: *mut c_void, tensor: *const C_tensor, root: i32) -> i32;
    pub(crate) fn vora_group_all_gather(
        group: *mut c_void,
        tensors: *const *const C_tensor,
        n: usize,
        gathered: *mut *mut C_tensor,
    ) -> i32;
    pub(crate) fn vora_group_abort(group: *mut c_void, reason: *const c_char);
    pub(crate) fn vora_group_waiting(group: *mut c_void) -> f64;
    pub(crate) fn vora_group_reduced(group: *mut c_void) -> u64;
    pub(crate) fn vora_gradients_new(
        group: *mut c_void,
        tensors: *const *const C_tensor,
        n: usize,
        bucket_bytes: i64,
    ) -> *mut c_void;
    pub(crate) fn vora_gradients_free(gradients: *mut c_void);
    pub(crate) fn vora_gradients_arm(gradients: *mut c_void) -> i32;
    pub(crate) fn vora_gradients_finish(gradients: *mut c_void) -> i32;
}
