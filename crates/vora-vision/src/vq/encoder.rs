//! Picture -> latents, from large and shallow to small and deep.

use anyhow::Result;
use tch::{Device, Kind, Tensor, nn::Module};

use super::blocks::{Conv2d, Downsample, Level, Mid, Out};
use super::config::VqConfig;
use super::params::Params;

/// Hugging Face's `ChameleonVQVAEEncoder`.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    down: Vec<(Level, Option<Downsample>)>, // the last keeps its size
    mid: Mid,
    out: Out,
}

impl Encoder {
    pub(super) fn load(config: &VqConfig, params: &Params) -> Result<Self> {
        let last = config.channel_multiplier.len() - 1;
        let mut channels = config.base_channels;
        let conv_in = Conv2d::load(&params.pp("conv_in"), config.in_channels, channels, 3)?;
        let mut down = Vec::with_capacity(last + 1);
        for level in 0..=last {
            let place = params.pp("down").pp(level);
            let blocks = Level::load(config, &place, level, channels, config.num_res_blocks)?;
            channels = config.channels(level);
            let downsample = || Downsample::load(&place.pp("downsample"), channels);
            down.push((blocks, (level < last).then(downsample).transpose()?));
        }
        Ok(Self {
            conv_in,
            down,
            mid: Mid::load(config, &params.pp("mid"), channels)?,
            out: Out::load(config, params, channels, config.latent_channels)?,
        })
    }

    /// The dtype that it computes in.
    pub(super) fn kind(&self) -> Kind {
        self.conv_in.kind()
    }

    /// The device that it computes on.
    pub(super) fn device(&self) -> Device {
        self.conv_in.device()
    }
}

impl Module for Encoder {
    /// `[batch, in_channels, height, width]` -> `[batch, latent_channels, height / stride, width / stride]`
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let mut h = self.conv_in.forward(pixel_values);
        for (level, downsample) in &self.down {
            h = level.forward(&h);
            if let Some(downsample) = downsample {
                h = downsample.forward(&h);
            }
        }
        self.out.forward(&self.mid.forward(&h))
    }
}
