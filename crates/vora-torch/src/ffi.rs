//! Declarations of `csrc/`, and its error text.

pub(crate) mod decode;
pub(crate) mod dist;

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Result, anyhow};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    /// glibc's
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    pub(crate) fn malloc_trim(pad: usize) -> i32;
    fn vora_last_error() -> *const c_char;
    pub(crate) fn vora_from_blob(
        data: *mut c_void,
        shape: *const i64,
        dims: usize,
        kind: i8,
        owner: *mut c_void,
        release: extern "C" fn(*mut c_void),
    ) -> *mut C_tensor;
    pub(crate) fn vora_fill_normal(tensor: *mut C_tensor, std: f64, seed: u64) -> i32;
    pub(crate) fn vora_fill_uniform(tensor: *mut C_tensor, bound: f64, seed: u64) -> i32;
    pub(crate) fn vora_fused_adamw(
        params: *const *const C_tensor,
        grads: *const *const C_tensor,
        exp_avgs: *const *const C_tensor,
        exp_avg_sqs: *const *const C_tensor,
        steps: *const *const C_tensor,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> i32;
    pub(crate) fn vora_grad_norm(grads: *const *const C_tensor, n: usize) -> *mut C_tensor;
    pub(crate) fn vora_scale(tensors: *const *const C_tensor, n: usize, factor: f64) -> i32;
    pub(crate) fn vora_dequantize(
        parts: *const *const C_tensor,
        n: usize,
        rows: i64,
        columns: i64,
        kind: i8,
    ) -> *mut C_tensor;
    pub(crate) fn vora_quantized_linear(
        x: *const C_tensor,
        bias: *const C_tensor,
        parts: *const *const C_tensor,
        n: usize,
        rows: i64,
        columns: i64,
    ) -> *mut C_tensor;
    pub(crate) fn vora_backward(tensor: *const C_tensor, gradient: *const C_tensor) -> i32;
    pub(crate) fn vora_cuda_memory(
        index: i8,
        allocated: *mut u64,
        peak: *mut u64,
        reserved: *mut u64,
        free: *mut u64,
    ) -> i32;
    pub(crate) fn vora_cpu_has_bf16() -> i32;
    pub(crate) fn vora_profile_start() -> i32;
    pub(crate) fn vora_profile_stop(path: *const c_char) -> i32;
    pub(crate) fn vora_rms_norm(x: *const C_tensor, weight: *const C_tensor, eps: f64) -> *mut C_tensor;
    pub(crate) fn vora_swiglu(gate: *const C_tensor, up: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn vora_cross_entropy(logits: *const C_tensor, targets: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn vora_kl_divergence(teacher: *const C_tensor, logits: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn vora_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        runs: *const C_tensor,
        bands: *const C_tensor,
    ) -> *mut C_tensor;
    pub(crate) fn vora_rotate(x: *const C_tensor, cos: *const C_tensor, sin: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn vora_packed_zeros(
        width: i64,
        out_features: i64,
        in_features: i64,
        values: *mut *mut C_tensor,
        scales: *mut *mut C_tensor,
    ) -> i32;
    pub(crate) fn vora_quantise(
        weight: *const C_tensor,
        width: i64,
        first: i64,
        values: *const C_tensor,
        scales: *const C_tensor,
    ) -> i32;
    pub(crate) fn vora_pack(
        values: *const C_tensor,
        scales: *const C_tensor,
        packed: *mut *mut C_tensor,
        packed_scales: *mut *mut C_tensor,
    ) -> i32;
    pub(crate) fn vora_unpack(
        matrix: *const decode::Matrix,
        values: *mut *mut C_tensor,
        scales: *mut *mut C_tensor,
    ) -> i32;
    pub(crate) fn vora_dequantise(
        matrix: *const decode::Matrix,
        rows: *const i64,
        n: i64,
        is_bf16: i32,
    ) -> *mut C_tensor;
    pub(crate) fn vora_linear(matrix: *const decode::Matrix, bias: *const f32, x: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn vora_decode_memory(decoder: *const decode::Decoder, step: *const decode::Step) -> i64;
    pub(crate) fn vora_decode_step(decoder: *const decode::Decoder, step: *const decode::Step, memory: *mut u8) -> i32;
}

/// What the last failed call of this thread said.
pub(crate) fn last_error() -> anyhow::Error {
    // SAFETY: the C++ side returns a thread-local string that lives until the next call of this thread.
    let text = unsafe { CStr::from_ptr(vora_last_error()) };
    anyhow!("libtorch: {}", text.to_string_lossy())
}

/// `Ok` where the call returned 0.
pub(crate) fn check(status: i32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(last_error()) }
}

/// The tensor that a call made, or why it made none.
pub(crate) fn tensor(ptr: *mut C_tensor) -> Result<Tensor> {
    if ptr.is_null() {
        return Err(last_error());
    }
    // SAFETY: the C++ side gave up a tensor made with `new`, which `Tensor` now owns.
    Ok(unsafe { Tensor::from_ptr(ptr) })
}

/// `c10::ScalarType` of a dtype that a checkpoint can hold, by its number in libtorch's ABI.
pub(crate) fn scalar_type(kind: Kind) -> i8 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => unreachable!("no tensor here is of {other:?}"),
    }
}

/// The pointers that a list argument takes.
pub(crate) fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|t| t.as_ptr()).collect()
}
