//! The structs of `csrc/decode/kernel.h` and `csrc/decode/step.h`, which point into tensors that their maker keeps.

use std::ffi::c_void;
use std::ptr;

/// `Matrix`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) width: i64,
    pub(crate) out_features: i64,
    pub(crate) in_features: i64,
    pub(crate) values: *const c_void,
    pub(crate) scales: *const u16,
}

impl Matrix {
    /// A matrix without rows.
    pub(crate) const NONE: Self =
        Self { width: 0, out_features: 0, in_features: 0, values: ptr::null(), scales: ptr::null() };
}

/// `Lora`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lora {
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
}

/// `Linear`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    pub(crate) base: Matrix,
    pub(crate) bias: *const f32,
    pub(crate) bias_is_adapted: i64,
    pub(crate) loras: *const Lora,
    pub(crate) num_loras: i64,
}

/// `HeadNorm`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadNorm {
    pub(crate) kind: i64,
    pub(crate) weight: *const f32,
    pub(crate) bias: *const f32,
    pub(crate) step: i64,
}

/// `Layer`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) linears: [Linear; 7],
    pub(crate) input_norm: *const f32,
    pub(crate) post_norm: *const f32,
    pub(crate) q_norm: HeadNorm,
    pub(crate) k_norm: HeadNorm,
    pub(crate) rotates: i64,
    pub(crate) window: i64,
}

/// `Decoder`
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) hidden: i64,
    pub(crate) intermediate: i64,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) head_dim: i64,
    pub(crate) norms_after: i64,
    pub(crate) eps: f64,
    pub(crate) head_eps: f64,
    pub(crate) scale: f64,
    pub(crate) layers: *const Layer,
    pub(crate) num_layers: i64,
    pub(crate) final_norm: *const f32,
    pub(crate) head: Linear,
}

/// `Step`
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) rows: i64,
    pub(crate) threads: i64,
    pub(crate) page_len: i64,
    pub(crate) max_pages: i64,
    pub(crate) pages_are_bf16: i64,
    pub(crate) tables: *const i32,
    pub(crate) lens: *const i64,
    pub(crate) ends: *const i64,
    pub(crate) cos: *const f32,
    pub(crate) sin: *const f32,
    pub(crate) adapters: *const u8,
    pub(crate) keys: *const *mut c_void,
    pub(crate) values: *const *mut c_void,
    pub(crate) x: *const f32,
    pub(crate) asked: *const i64,
    pub(crate) num_asked: i64,
    pub(crate) logits: *mut f32,
}
