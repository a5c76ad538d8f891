//! A frozen vision transformer whose hidden states a student learns to predict, whichever one it is.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};
use vora_torch::weights::Weights;

use crate::dinov2::{Dinov2, Dinov2Config};
use crate::preprocess::{IMAGENET_DEFAULT, ImageProcessor, Resample};

/// The transformers that are known here.
#[derive(Debug)]
enum Encoder {
    Dinov2(Dinov2),
}

/// A frozen vision transformer and the way its pictures are prepared.
#[derive(Debug)]
pub struct Teacher {
    encoder: Encoder,
    processor: ImageProcessor,
}

/// What a teacher knows before its first block: a start for a student's own patch embedding.
#[derive(Debug)]
pub struct Patchifier<'a> {
    /// `[hidden, 3, patch, patch]`
    pub weight: &'a Tensor,
    /// `[hidden]`
    pub bias: &'a Tensor,
    /// `[side * side, hidden]`
    pub positions: Tensor,
}

impl Patchifier<'_> {
    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        self.weight.size()[3]
    }
}

impl Teacher {
    /// Opens a model folder: `config.json` says which transformer it is, `preprocessor_config.json` how pictures are
    /// prepared (ImageNet's mean and std where there is none).
    ///
    /// # Errors
    /// Names the file and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        #[derive(Deserialize)]
        struct ModelType {
            model_type: String,
        }
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path)
            .with_context(|| format!("cannot read {}; a teacher is a folder with config.json in it", path.display()))?;
        let ModelType { model_type } =
            serde_json::from_slice(&bytes).with_context(|| format!("in {}", path.display()))?;
        let encoder = match model_type.as_str() {
            "dinov2" | "dinov2_with_registers" => {
                let weights = Weights::open(folder, device, kind)?;
                let model = Dinov2::load(&Dinov2Config::open(folder)?, &weights)?;
                weights.finish().with_context(|| format!("loading the teacher in {}", folder.display()))?;
                Encoder::Dinov2(model)
            }
            other => bail!(
                "{}: model_type `{other}` is not a teacher known here; dinov2 and dinov2_with_registers are",
                path.display()
            ),
        };
        let prepared = ["preprocessor_config.json", "processor_config.json"].iter().any(|f| folder.join(f).exists());
        let processor = if prepared { ImageProcessor::open(folder)? } else { imagenet_processor(&encoder) };
        Ok(Self { encoder, processor })
    }

    /// Channels of its hidden states.
    pub fn hidden_size(&self) -> i64 {
        match &self.encoder {
            Encoder::Dinov2(model) => model.config().hidden_size,
        }
    }

    /// Its blocks.
    pub fn num_hidden_layers(&self) -> usize {
        match &self.encoder {
            Encoder::Dinov2(model) => model.config().num_hidden_layers,
        }
    }

    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        match &self.encoder {
            Encoder::Dinov2(model) => model.config().patch_size,
        }
    }

    /// How its pictures are prepared; [`ImageProcessor::at`] gives the same for another size.
    pub fn processor(&self) -> &ImageProcessor {
        &self.processor
    }

    /// The start for a student's own patch embedding.
    pub fn patchifier(&self) -> Patchifier<'_> {
        match &self.encoder {
            Encoder::Dinov2(model) => model.patchifier(),
        }
    }

    /// `[batch, 3, height, width]` -> for embeddings (index 0) and each of the first `num_layers` blocks
    /// `[batch, patches, hidden]`: patch tokens only, row by row.
    pub fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        match &self.encoder {
            Encoder::Dinov2(model) => model
                .first_hidden_states(pixel_values, num_layers)
                .iter()
                .map(|hidden| model.patch_tokens(hidden))
                .collect(),
        }
    }

    /// `[batch, 3, height, width]` -> embeddings and the output of every block, `[batch, tokens, hidden]` each, in
    /// Hugging Face's order. Tokens that are no patch stand before the patches.
    pub fn hidden_states(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        match &self.encoder {
            Encoder::Dinov2(model) => model.hidden_states(pixel_values),
        }
    }

    /// `[batch, tokens, hidden]` -> `[batch, patches, hidden]`
    pub fn patch_tokens(&self, hidden: &Tensor) -> Tensor {
        match &self.encoder {
            Encoder::Dinov2(model) => model.patch_tokens(hidden),
        }
    }
}

/// A teacher that is not in a folder, as tests have it; pictures are prepared with ImageNet's mean and std.
impl From<Dinov2> for Teacher {
    fn from(model: Dinov2) -> Self {
        let encoder = Encoder::Dinov2(model);
        let processor = imagenet_processor(&encoder);
        Self { encoder, processor }
    }
}

fn imagenet_processor(encoder: &Encoder) -> ImageProcessor {
    let image_size = match encoder {
        Encoder::Dinov2(model) => model.config().image_size,
    };
    let (mean, std) = IMAGENET_DEFAULT;
    ImageProcessor::square(u32::try_from(image_size).unwrap_or(224), mean, std, Resample::Bicubic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use vora_torch::safetensors::save;

    #[test]
    fn opens_a_folder_by_its_model_type() {
        let golden = fixtures::open("dinov2");
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        std::fs::copy(fixtures::root().join("golden/dinov2.json"), folder.path().join("config.json")).unwrap();
        save(&folder.path().join("model.safetensors"), &golden.under("weights."), &[]).unwrap();
        write("preprocessor_config.json", json!({"image_mean": [0.1, 0.2, 0.3], "size": 32}).to_string());

        let teacher = Teacher::open(folder.path(), Device::Cpu, Kind::Float).unwrap();
        assert_eq!((teacher.hidden_size(), teacher.num_hidden_layers(), teacher.patch_size()), (16, 3, 4));
        assert_eq!(teacher.processor().mean_std().0, [0.1, 0.2, 0.3]);
        let states = teacher.patch_states(&golden["native.pixel_values"], 2);
        assert_eq!(states.len(), 3);
        fixtures::assert_close(&states[2], &golden["native.hidden_states.2"].narrow(1, 1, 16));

        write("config.json", json!({"model_type": "resnet"}).to_string());
        let error = format!("{:#}", Teacher::open(folder.path(), Device::Cpu, Kind::Float).unwrap_err());
        assert!(error.contains("model_type `resnet` is not a teacher known here; dinov2"), "{error}");
        let error = format!("{:#}", Teacher::open(Path::new("nowhere"), Device::Cpu, Kind::Float).unwrap_err());
        assert!(error.contains("cannot read nowhere/config.json; a teacher is a folder"), "{error}");
    }
}
