//! A teacher that is shown a student's pictures as it knows them: with its own means, and in a size that lays whole patches of
//! its own on every token of the student's.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use vora_vision::Encoder;

use crate::pictures::Pictures;
use crate::teacher::Teacher;

/// A vision transformer of a folder behind what fits pictures to it.
#[derive(Debug)]
pub(crate) struct FittedTeacher {
    encoder: Encoder,
    scale: Tensor, // [3, 1, 1]
    shift: Tensor, // [3, 1, 1]
    token_size: i64,
    patches: i64, // of its own along the side of a token
}

impl FittedTeacher {
    /// For a student whose pictures are these.
    pub(crate) fn new(encoder: Encoder, pictures: &Pictures, device: Device) -> Self {
        let ((mean, std), (own_mean, own_std)) = (pictures.processor.mean_std(), encoder.processor().mean_std());
        let channels = |of: &dyn Fn(usize) -> f64| {
            let values = [0, 1, 2].map(|channel| of(channel) as f32);
            Tensor::from_slice(&values).view([3, 1, 1]).to_device(device)
        };
        let scale = channels(&|channel| std[channel] / own_std[channel]);
        let shift = channels(&|channel| (mean[channel] - own_mean[channel]) / own_std[channel]);
        let token_size = pictures.patch_size;
        let patches = (token_size as f64 / encoder.patch_size() as f64).round().max(1.0) as i64;
        Self { encoder, scale, shift, token_size, patches }
    }

    /// What it makes of a picture before it looks, in words.
    pub(crate) fn view(&self) -> String {
        let values = |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap_or_default();
        let (scale, shift) = (values(&self.scale), values(&self.shift));
        format!(", times {scale:?} plus {shift:?}, {} patches on {} pixels", self.patches, self.token_size)
    }

    /// `[n, 3, height, width]` as the student is given them -> as the encoder knows them.
    fn fitted(&self, pixel_values: &Tensor) -> Result<Tensor, tch::TchError> {
        let pixels = pixel_values.to_kind(Kind::Float) * &self.scale + &self.shift;
        let (_, _, height, width) = pixels.size4()?;
        let (rows, columns) = self.grid(height, width);
        let size = [rows, columns].map(|patches| patches * self.encoder.patch_size());
        if size == [height, width] {
            return Ok(pixels);
        }
        pixels.f_internal_upsample_bicubic2d_aa(size, false, None, None)
    }
}

impl Teacher for FittedTeacher {
    fn num_hidden_layers(&self) -> usize {
        self.encoder.num_hidden_layers()
    }

    fn hidden_size(&self) -> i64 {
        self.encoder.hidden_size()
    }

    fn grid(&self, height: i64, width: i64) -> (i64, i64) {
        (height / self.token_size * self.patches, width / self.token_size * self.patches)
    }

    fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let pixels = self.fitted(pixel_values).expect("pixel_values is [n, 3, height, width]");
        self.encoder.patch_states(&pixels, num_layers)
    }

    fn first_hidden_state(&self) -> usize {
        self.encoder.first_hidden_state()
    }

    fn num_parameters(&self) -> u64 {
        Teacher::num_parameters(&self.encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_image::{ImageProcessor, RgbImage};

    /// What it sees of a picture is what it would see by its own processor, where both cut it alike.
    #[test]
    fn it_sees_what_its_own_processor_would_have_shown() {
        let tiny = |name: &str| fixtures::root().join("tiny").join(name);
        let encoder = Encoder::open(&tiny("dinov2"), Device::Cpu, Kind::Float).unwrap();
        let own = encoder.processor().clone();
        let gemma = ImageProcessor::open(&tiny("gemma4")).unwrap();
        let picture = RgbImage::from_fn(28, 28, |x, y| [(x * 9) as u8, (y * 9) as u8, 77].into());
        let [shown, expected] = [&gemma, &own].map(|like| {
            let squares = like.with_aspect(28, vora_image::Aspect::Squash);
            vora_vision::stack(&[squares.preprocess(&picture).unwrap()]).unwrap()
        });
        let fitted = FittedTeacher::new(encoder, &Pictures::new(gemma, 14), Device::Cpu);
        assert_eq!(fitted.grid(28, 56), (2, 4));
        let (found, wanted) = (fitted.patch_states(&shown, 1), fitted.encoder.patch_states(&expected, 1));
        fixtures::assert_close_to(&found[1], &wanted[1], 1e-5);
        // Its patches of 14 on tokens of 4: one each, of an enlarged picture.
        let FittedTeacher { encoder, .. } = fitted;
        let small =
            FittedTeacher::new(encoder, &Pictures::new(ImageProcessor::open(&tiny("gemma4")).unwrap(), 4), Device::Cpu);
        assert_eq!(small.grid(8, 12), (2, 3));
        let states = small.patch_states(&Tensor::zeros([1, 3, 8, 12], (Kind::Float, Device::Cpu)), 1);
        assert_eq!(states[1].size()[1], 6);
        assert_ne!(small.view(), "");
    }
}
