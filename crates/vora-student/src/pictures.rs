//! How a run's pictures are prepared. One processor serves training, what is shown of the data, evaluation, and every
//! answer of the trained model, in whose folder it is stored.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use vora_image::{Aspect, IMAGENET_DEFAULT, ImageProcessor, Resample, chameleon_processor};
use vora_model::trained::{self, VISION};
use vora_model::{Chameleon, Gemma4UnifiedConfig, Resolve, VisionEmbeddingType, llm_config};
use vora_recipe::{FramesOps, ImageAspectRatio, ModelType, TrainConfig, Way};
use vora_vision::EncoderConfig;

/// What a run's model is shown of a picture.
#[derive(Debug, Clone)]
pub struct Pictures {
    /// What pictures go through.
    pub processor: ImageProcessor,
    /// Side of the square that becomes one token of a picture, in pixels.
    pub patch_size: i64,
    /// The tokens before and after every picture.
    pub(crate) image_marks: Option<(i64, i64)>,
}

impl Pictures {
    /// Pictures that go through `processor`, of which squares of `patch_size` pixels a side become a token each.
    pub fn new(processor: ImageProcessor, patch_size: i64) -> Self {
        Self { processor, patch_size, image_marks: None }
    }

    /// The same with tokens before and after every picture.
    pub(crate) fn with_image_marks(self, image_marks: Option<(i64, i64)>) -> Self {
        Self { image_marks, ..self }
    }

    /// Those of a run, whose LLM lies in `llm_folder`; known from the models' configs without their weights.
    ///
    /// # Errors
    /// Names the key, and the file, that does not fit.
    pub(crate) fn open(config: &TrainConfig, llm_folder: &Path, resolve: &Resolve<'_>) -> Result<Self> {
        let section = &config.model;
        let side = u32::try_from(section.image_size)?;
        let llm = llm_config(llm_folder).context("model.llm")?;
        let encoder = |name: &str| {
            let folder = resolve(name)?;
            let config = EncoderConfig::open(&folder)?;
            anyhow::Ok((config.processor(&folder)?, config.patch_size()))
        };
        let (own, patch_size, image_marks) = match section.way()? {
            Way::Vora { patch_size } => {
                let processor = match &section.aux_vision {
                    Some(teacher) => encoder(teacher).context("model.aux_vision")?.0,
                    None => {
                        let (mean, std) = match section.vision_embedding.unwrap_or_default() {
                            VisionEmbeddingType::Aimv2 => IMAGENET_DEFAULT,
                            VisionEmbeddingType::Gemma4Unified => ([0.0; 3], [1.0; 3]), // in [0, 1], as Gemma 4's own
                        };
                        ImageProcessor::square(side, mean, std, Resample::Bicubic)
                    }
                };
                (processor, patch_size, None)
            }
            Way::Llava { vision_tower } => {
                let (processor, patch_size) = encoder(vision_tower).context("model.vision_tower")?;
                (processor, patch_size, None)
            }
            Way::Chameleon { vqmodel } => {
                let vq = vqmodel.config(section.image_size);
                let chameleon = Chameleon::config_over(&llm, &vq).context("model.llm")?;
                (chameleon_processor(side)?, vq.stride(), Some(Chameleon::image_marks_of(&chameleon)?))
            }
            Way::Gemma4Unified => return Self::of_gemma4(config, llm_folder),
        };
        let pretrained = section.pretrained.as_deref().map(resolve).transpose().context("model.pretrained")?;
        if let Some(folder) = &pretrained {
            if section.model_type == ModelType::Llava {
                ensure!(
                    trained::is_part(folder),
                    "model.pretrained: {} has no {VISION}; it takes a run's final/",
                    folder.display()
                );
            } else {
                let file = folder.join("config.json");
                ensure!(file.is_file(), "model.pretrained: there is no {}", file.display());
            }
        }
        let processor = processor(config, &own, pretrained.as_deref(), resolve)?;
        Ok(Self { processor, patch_size, image_marks })
    }

    /// Those of a Gemma 4 Unified: its own processor's, within the run's budget.
    fn of_gemma4(config: &TrainConfig, folder: &Path) -> Result<Self> {
        let ops = config.data.train.data_preprocess.as_ref().and_then(|preprocess| preprocess.frames_ops.as_ref());
        ensure!(ops.is_none(), "data_preprocess.frames_ops: pictures go through a Gemma 4 Unified's own processor");
        let gemma = Gemma4UnifiedConfig::open(folder).context("model.llm")?;
        let mut processor = ImageProcessor::open(folder).context("model.llm")?;
        let (side, own) = (processor.token_size().map(i64::from), gemma.vision.token_size());
        ensure!(
            side == Some(own),
            "model.llm: {} has an image processor that takes {} for a token, and a vision_config of {own} x {own} pixels",
            folder.display(),
            side.map_or("no square of pixels".to_owned(), |side| format!("{side} x {side} pixels"))
        );
        if let Some(max_image_tokens) = config.model.max_image_tokens {
            processor = processor.with_max_image_tokens(max_image_tokens).context("model")?;
        }
        let (patch_size, marks) = (gemma.vision.token_size(), (gemma.boi_token_id, gemma.eoi_token_id));
        Ok(Self::new(processor, patch_size).with_image_marks(Some(marks)))
    }

    /// Side of a square picture as the model gets it where its pictures keep their shape, in pixels: the smallest that the
    /// processor makes.
    ///
    /// # Errors
    /// Where it makes no squares of squares.
    pub(crate) fn square_side(&self) -> Result<i64> {
        let patch = u32::try_from(self.patch_size)?;
        let (height, width) = self.processor.output_size(patch, patch)?;
        ensure!(height == width, "a square becomes {width} x {height} pixels");
        Ok(i64::from(height))
    }
}

/// The processor of a run: squares of `model.image_size`, or pictures in their own shape within a budget of tokens.
/// Channels and sampling are those of the recipe's `frames_ops`, else of the model that is gone on from, else the model's
/// `own`; what becomes of a picture that is not square, the run file says, or the same in that order; a new run pads.
///
/// # Errors
/// Names the key, and the file, that does not fit.
fn processor(
    config: &TrainConfig,
    own: &ImageProcessor,
    pretrained: Option<&Path>,
    resolve: &Resolve<'_>,
) -> Result<ImageProcessor> {
    let section = &config.model;
    let ops = config.data.train.data_preprocess.as_ref().and_then(|preprocess| preprocess.frames_ops.as_ref());
    let (base, aspect) = match (ops, pretrained) {
        (Some(ops), _) => {
            let base = named(ops, resolve).context("data_preprocess.frames_ops")?;
            let aspect = ops.background_color().map_or(base.aspect(), Aspect::Pad);
            (base, aspect)
        }
        (None, Some(folder)) => {
            let base = ImageProcessor::open(folder).context("model.pretrained")?;
            let aspect = base.aspect();
            (base, aspect)
        }
        (None, None) => (own.clone(), Aspect::Pad(own.mean_color())),
    };
    let color = || section.background_color.unwrap_or(base.mean_color());
    let aspect = match (section.token_budget()?, section.image_aspect_ratio) {
        (Some(budget), _) => Aspect::Keep(budget),
        (None, Some(ImageAspectRatio::Pad)) => Aspect::Pad(color()),
        (None, Some(ImageAspectRatio::Squash)) => Aspect::Squash,
        (None, Some(ImageAspectRatio::Crop)) => Aspect::Crop,
        (None, None) if section.background_color.is_some() => Aspect::Pad(color()),
        (None, None) => aspect,
    };
    Ok(base.with_aspect(u32::try_from(section.image_size)?, aspect))
}

/// The processor of the vision model that a recipe names.
fn named(ops: &FramesOps, resolve: &Resolve<'_>) -> Result<ImageProcessor> {
    let folder = resolve(ops.path())?;
    if folder.join("config.json").exists() {
        return EncoderConfig::open(&folder)?.processor(&folder);
    }
    ImageProcessor::open(&folder)
}
