//! One layer of a [`Decoder`](super::Decoder).

use std::ptr;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::shape::DecoderShape;
use crate::ffi::decode as raw;
use crate::packed::PackedLinear;

/// The norm of each head of q or k.
#[derive(Debug)]
pub enum HeadNorm {
    /// `x / rms(x) * weight`, with one weight `[head_dim]` for all heads.
    Rms(Tensor),
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`
    Layer {
        /// `[heads, head_dim]`
        weight: Tensor,
        /// `[heads, head_dim]`
        bias: Tensor,
    },
}

/// Attention and MLP of one layer.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are those of the checkpoint")]
pub struct Layer {
    pub q_proj: PackedLinear,
    pub k_proj: PackedLinear,
    pub v_proj: PackedLinear,
    pub o_proj: PackedLinear,
    pub gate_proj: PackedLinear,
    pub up_proj: PackedLinear,
    pub down_proj: PackedLinear,
    /// `[hidden]`
    pub input_layernorm: Tensor,
    /// `[hidden]`
    pub post_attention_layernorm: Tensor,
    pub q_norm: Option<HeadNorm>,
    pub k_norm: Option<HeadNorm>,
    /// Whether q and k are rotated.
    pub rotates: bool,
    /// Width of its window, the new token counted, where it has one.
    pub window: Option<i64>,
}

impl Layer {
    /// The same with norms as the kernels read them.
    ///
    /// # Errors
    /// What does not fit the decoder's sizes.
    pub(super) fn checked(self, shape: &DecoderShape) -> Result<Self> {
        let (hidden, heads, kv_heads) = (shape.hidden_size, shape.num_heads, shape.num_kv_heads);
        let (q_len, k_len) = (heads * shape.head_dim, kv_heads * shape.head_dim);
        for (name, linear, [out_features, in_features]) in [
            ("q_proj", &self.q_proj, [q_len, hidden]),
            ("k_proj", &self.k_proj, [k_len, hidden]),
            ("v_proj", &self.v_proj, [k_len, hidden]),
            ("o_proj", &self.o_proj, [hidden, q_len]),
            ("gate_proj", &self.gate_proj, [shape.intermediate_size, hidden]),
            ("up_proj", &self.up_proj, [shape.intermediate_size, hidden]),
            ("down_proj", &self.down_proj, [hidden, shape.intermediate_size]),
        ] {
            let found = [linear.out_features(), linear.in_features()];
            ensure!(
                found == [out_features, in_features],
                "{name} is {found:?}, expected [{out_features}, {in_features}]"
            );
        }
        ensure!(self.window.is_none_or(|window| window > 0), "a window of {:?}", self.window);
        Ok(Self {
            input_layernorm: read(&self.input_layernorm, &[hidden])?,
            post_attention_layernorm: read(&self.post_attention_layernorm, &[hidden])?,
            q_norm: self.q_norm.map(|norm| norm.checked(heads, shape.head_dim)).transpose()?,
            k_norm: self.k_norm.map(|norm| norm.checked(kv_heads, shape.head_dim)).transpose()?,
            ..self
        })
    }

    /// The linear layers in the order of [`raw::Layer`].
    pub(super) fn linears(&self) -> [&PackedLinear; 7] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj, &self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// What `csrc/` takes, which points into tensors of `self`.
    pub(super) fn raw(&self) -> raw::Layer {
        raw::Layer {
            linears: self.linears().map(PackedLinear::raw),
            input_norm: pointer(&self.input_layernorm),
            post_norm: pointer(&self.post_attention_layernorm),
            q_norm: HeadNorm::raw(self.q_norm.as_ref()),
            k_norm: HeadNorm::raw(self.k_norm.as_ref()),
            rotates: i64::from(self.rotates),
            window: self.window.unwrap_or(0),
        }
    }
}

impl HeadNorm {
    fn checked(self, heads: i64, head_dim: i64) -> Result<Self> {
        Ok(match self {
            Self::Rms(weight) => Self::Rms(read(&weight, &[head_dim])?),
            Self::Layer { weight, bias } => {
                Self::Layer { weight: read(&weight, &[heads, head_dim])?, bias: read(&bias, &[heads, head_dim])? }
            }
        })
    }

    fn raw(norm: Option<&Self>) -> raw::HeadNorm {
        match norm {
            None => raw::HeadNorm { kind: 0, weight: ptr::null(), bias: ptr::null(), step: 0 },
            Some(Self::Rms(weight)) => raw::HeadNorm { kind: 1, weight: pointer(weight), bias: ptr::null(), step: 0 },
            Some(Self::Layer { weight, bias }) => {
                raw::HeadNorm { kind: 2, weight: pointer(weight), bias: pointer(bias), step: weight.size()[1] }
            }
        }
    }
}

/// A norm's tensor in f32.
pub(super) fn read(t: &Tensor, size: &[i64]) -> Result<Tensor> {
    ensure!(
        t.size() == size && t.device() == Device::Cpu,
        "a norm {:?} on {:?}, expected {size:?}",
        t.size(),
        t.device()
    );
    Ok(t.detach().to_kind(Kind::Float).contiguous())
}

pub(super) fn pointer(t: &Tensor) -> *const f32 {
    t.data_ptr() as *const f32
}
