//! What encoder and decoder of a VQGAN are both made of: convolutions, residual blocks, attention, levels.

use anyhow::Result;
use tch::{Device, Kind, Tensor, nn::Module};
use vora_torch::weights::Init;

use super::config::VqConfig;
use super::params::Params;

/// A convolution over a square of `kernel` pixels.
#[derive(Debug)]
pub(super) struct Conv2d {
    weight: Tensor, // [out, in, kernel, kernel]
    bias: Tensor,   // [out]
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// One that keeps the picture's size. A new one keeps the variance too (LeCun 1998): some ten of them follow one
    /// another with nothing beside them, and what PyTorch starts with, a third of it, leaves nothing of the picture.
    pub(super) fn load(params: &Params, inputs: i64, outputs: i64, kernel: i64) -> Result<Self> {
        let std = 1.0 / ((inputs * kernel * kernel) as f64).sqrt();
        Self::start(params, inputs, outputs, kernel, Init::Normal { std })
    }

    fn start(params: &Params, inputs: i64, outputs: i64, kernel: i64, init: Init) -> Result<Self> {
        Ok(Self {
            weight: params.get("weight", &[outputs, inputs, kernel, kernel], init)?,
            bias: params.get("bias", &[outputs], Init::Zeros)?,
            stride: 1,
            padding: kernel / 2,
        })
    }

    /// The dtype that it computes in.
    pub(super) fn kind(&self) -> Kind {
        self.weight.kind()
    }

    /// The device that it computes on.
    pub(super) fn device(&self) -> Device {
        self.weight.device()
    }
}

impl Module for Conv2d {
    /// `[batch, in, height, width]` -> `[batch, out, height / stride, width / stride]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)
    }
}

/// `y = (x - mean) / sqrt(var + 1e-6) * weight + bias`, mean and variance over a picture and a group of its channels
/// (Wu & He 2018).
#[derive(Debug)]
pub(super) struct GroupNorm {
    weight: Tensor, // [channels]
    bias: Tensor,   // [channels]
    groups: i64,
}

impl GroupNorm {
    pub(super) fn load(config: &VqConfig, params: &Params, channels: i64) -> Result<Self> {
        Ok(Self {
            groups: config.norm_num_groups,
            weight: params.get("weight", &[channels], Init::Ones)?,
            bias: params.get("bias", &[channels], Init::Zeros)?,
        })
    }
}

impl Module for GroupNorm {
    /// `[batch, channels, height, width]` -> the same
    fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), 1e-6, true)
    }
}

/// `y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    nin_shortcut: Option<Conv2d>, // where the channels change
}

impl ResnetBlock {
    /// A new one does nothing at first: what it adds is zero.
    fn load(config: &VqConfig, params: &Params, inputs: i64, outputs: i64) -> Result<Self> {
        let shortcut = || Conv2d::load(&params.pp("nin_shortcut"), inputs, outputs, 1);
        Ok(Self {
            norm1: GroupNorm::load(config, &params.pp("norm1"), inputs)?,
            conv1: Conv2d::load(&params.pp("conv1"), inputs, outputs, 3)?,
            norm2: GroupNorm::load(config, &params.pp("norm2"), outputs)?,
            conv2: Conv2d::start(&params.pp("conv2"), outputs, outputs, 3, Init::Zeros)?,
            nin_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }
}

impl Module for ResnetBlock {
    /// `[batch, in, height, width]` -> `[batch, out, height, width]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let h = self.conv1.forward(&self.norm1.forward(x).silu());
        let h = self.conv2.forward(&self.norm2.forward(&h).silu());
        match &self.nin_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

/// `y = x + proj_out(attention(norm(x)))`: one head, from every place to every place.
#[derive(Debug)]
pub(super) struct AttnBlock {
    norm: GroupNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    proj_out: Conv2d,
}

impl AttnBlock {
    fn load(config: &VqConfig, params: &Params, channels: i64) -> Result<Self> {
        let part = |name| Conv2d::load(&params.pp(name), channels, channels, 1);
        Ok(Self {
            norm: GroupNorm::load(config, &params.pp("norm"), channels)?,
            q: part("q")?,
            k: part("k")?,
            v: part("v")?,
            proj_out: part("proj_out")?,
        })
    }
}

impl Module for AttnBlock {
    /// `[batch, channels, height, width]` -> the same
    fn forward(&self, x: &Tensor) -> Tensor {
        let normed = self.norm.forward(x);
        let part = |conv: &Conv2d| conv.forward(&normed).flatten(2, 3).transpose(1, 2).unsqueeze(1);
        let [q, k, v] = [&self.q, &self.k, &self.v].map(part); // [batch, 1, height * width, channels]
        let h = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false);
        x + self.proj_out.forward(&h.squeeze_dim(1).transpose(1, 2).reshape(x.size()))
    }
}

/// The middle, at the size of the codes.
#[derive(Debug)]
pub(super) struct Mid {
    block_1: ResnetBlock,
    attn_1: Option<AttnBlock>,
    block_2: ResnetBlock,
}

impl Mid {
    pub(super) fn load(config: &VqConfig, params: &Params, channels: i64) -> Result<Self> {
        let attention = || AttnBlock::load(config, &params.pp("attn_1"), channels);
        Ok(Self {
            block_1: ResnetBlock::load(config, &params.pp("block_1"), channels, channels)?,
            attn_1: config.has_attention().then(attention).transpose()?,
            block_2: ResnetBlock::load(config, &params.pp("block_2"), channels, channels)?,
        })
    }
}

impl Module for Mid {
    /// `[batch, channels, rows, columns]` -> the same
    fn forward(&self, x: &Tensor) -> Tensor {
        let mut h = self.block_1.forward(x);
        if let Some(attention) = &self.attn_1 {
            h = attention.forward(&h);
        }
        self.block_2.forward(&h)
    }
}

/// Residual blocks at one size, each with attention after it where the level has attention.
#[derive(Debug)]
pub(super) struct Level {
    block: Vec<ResnetBlock>,
    attn: Vec<AttnBlock>, // as many, or none
}

impl Level {
    /// `num_blocks` blocks from `inputs` channels to those of `level`.
    pub(super) fn load(
        config: &VqConfig,
        params: &Params,
        level: usize,
        inputs: i64,
        num_blocks: usize,
    ) -> Result<Self> {
        let outputs = config.channels(level);
        let block = |i| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock::load(config, &params.pp("block").pp(i), inputs, outputs)
        };
        let attn = |i| AttnBlock::load(config, &params.pp("attn").pp(i), outputs);
        let num_attn = if config.has_attention_at(level) { num_blocks } else { 0 };
        Ok(Self {
            block: (0..num_blocks).map(block).collect::<Result<_>>()?,
            attn: (0..num_attn).map(attn).collect::<Result<_>>()?,
        })
    }
}

impl Module for Level {
    /// `[batch, in, height, width]` -> `[batch, out, height, width]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let mut h = x.shallow_clone();
        for (i, block) in self.block.iter().enumerate() {
            h = block.forward(&h);
            if let Some(attention) = self.attn.get(i) {
                h = attention.forward(&h);
            }
        }
        h
    }
}

/// Halves both sides: padded to the right and below only, then every second pixel.
#[derive(Debug)]
pub(super) struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    pub(super) fn load(params: &Params, channels: i64) -> Result<Self> {
        let conv = Conv2d::load(&params.pp("conv"), channels, channels, 3)?;
        Ok(Self { conv: Conv2d { stride: 2, padding: 0, ..conv } })
    }
}

impl Module for Downsample {
    /// `[batch, channels, height, width]` -> `[batch, channels, height / 2, width / 2]`
    fn forward(&self, x: &Tensor) -> Tensor {
        self.conv.forward(&x.constant_pad_nd([0, 1, 0, 1]))
    }
}

/// Doubles both sides: every pixel four times, then a convolution.
#[derive(Debug)]
pub(super) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(super) fn load(params: &Params, channels: i64) -> Result<Self> {
        Ok(Self { conv: Conv2d::load(&params.pp("conv"), channels, channels, 3)? })
    }
}

impl Module for Upsample {
    /// `[batch, channels, height, width]` -> `[batch, channels, 2 * height, 2 * width]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (_, _, height, width) = x.size4().expect("x is [batch, channels, height, width]");
        self.conv.forward(&x.upsample_nearest2d([2 * height, 2 * width], None, None))
    }
}

/// The last norm and convolution of either way: `y = conv_out(silu(norm_out(x)))`
#[derive(Debug)]
pub(super) struct Out {
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Out {
    pub(super) fn load(config: &VqConfig, params: &Params, inputs: i64, outputs: i64) -> Result<Self> {
        Ok(Self {
            norm_out: GroupNorm::load(config, &params.pp("norm_out"), inputs)?,
            conv_out: Conv2d::load(&params.pp("conv_out"), inputs, outputs, 3)?,
        })
    }
}

impl Module for Out {
    /// `[batch, in, height, width]` -> `[batch, out, height, width]`
    fn forward(&self, x: &Tensor) -> Tensor {
        self.conv_out.forward(&self.norm_out.forward(x).silu())
    }
}
