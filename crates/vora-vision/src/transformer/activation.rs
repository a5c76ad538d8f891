//! The activations of feed-forward layers, by the names that `hidden_act` has for them.

use anyhow::{Result, bail};
use tch::Tensor;

/// A function of each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x * P(X <= x)`, X normal.
    Gelu,
    /// The same through a tanh.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`, as OpenAI's CLIP has it.
    QuickGelu,
    /// `x * sigmoid(x)`
    Silu,
}

impl Activation {
    /// # Errors
    /// Where the name is not known here.
    pub(crate) fn named(hidden_act: &str) -> Result<Self> {
        Ok(match hidden_act {
            "gelu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "silu" | "swish" => Self::Silu,
            _ => bail!("hidden_act is `{hidden_act}`, known here are gelu, gelu_pytorch_tanh, quick_gelu and silu"),
        })
    }

    /// `[..]` -> `[..]`
    pub(crate) fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Self::Gelu => x.gelu("none"),
            Self::GeluTanh => x.gelu("tanh"),
            Self::QuickGelu => x * (x * 1.702).sigmoid(),
            Self::Silu => x.silu(),
        }
    }
}
