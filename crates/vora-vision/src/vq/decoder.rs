//! Latents -> picture: the encoder's mirror.

use anyhow::Result;
use tch::{Tensor, nn::Module};

use super::blocks::{Conv2d, Level, Mid, Out, Upsample};
use super::config::VqConfig;
use super::params::Params;

/// The decoder of the public VQGAN. Its levels are numbered as the encoder's, from the picture's size down, and so are
/// run from the last to the first.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: Mid,
    up: Vec<(Level, Option<Upsample>)>, // in the order they are run; the last keeps its size
    out: Out,
}

impl Decoder {
    pub(super) fn load(config: &VqConfig, params: &Params) -> Result<Self> {
        let last = config.channel_multiplier.len() - 1;
        let mut channels = config.channels(last);
        let conv_in = Conv2d::load(&params.pp("conv_in"), config.latent_channels, channels, 3)?;
        let mid = Mid::load(config, &params.pp("mid"), channels)?;
        let mut up = Vec::with_capacity(last + 1);
        for level in (0..=last).rev() {
            let place = params.pp("up").pp(level);
            let blocks = Level::load(config, &place, level, channels, config.num_res_blocks + 1)?;
            channels = config.channels(level);
            let upsample = || Upsample::load(&place.pp("upsample"), channels);
            up.push((blocks, (level > 0).then(upsample).transpose()?));
        }
        Ok(Self { conv_in, mid, up, out: Out::load(config, params, channels, config.in_channels)? })
    }
}

impl Module for Decoder {
    /// `[batch, latent_channels, rows, columns]` -> `[batch, in_channels, rows * stride, columns * stride]`
    fn forward(&self, latents: &Tensor) -> Tensor {
        let mut h = self.mid.forward(&self.conv_in.forward(latents));
        for (level, upsample) in &self.up {
            h = level.forward(&h);
            if let Some(upsample) = upsample {
                h = upsample.forward(&h);
            }
        }
        self.out.forward(&h)
    }
}
