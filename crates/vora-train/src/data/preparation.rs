//! A run's [`Preparation`], from its run file and its models' configs without their weights.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use vora_data::Preparation;
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, chameleon_processor};
use vora_llm::LlmConfig;
use vora_model::Chameleon;
use vora_model::Resolve;
use vora_model::trained::{self, VISION};
use vora_text::{ChatTemplate, Tokenizer, special_tokens};
use vora_vision::EncoderConfig;

use super::pictures;
use crate::config::model::{ModelType, Way};
use crate::config::run::TrainConfig;

/// Where the LLM of a run lies.
///
/// # Errors
/// Where its name leads nowhere.
pub(crate) fn llm_folder(config: &TrainConfig, resolve: &Resolve<'_>) -> Result<PathBuf> {
    resolve(&config.model.llm).context("model.llm")
}

/// The preparation of a run; its models are not opened for it.
///
/// # Errors
/// Names the key, and the file, that does not fit.
pub fn preparation(config: &TrainConfig, resolve: &Resolve<'_>) -> Result<Preparation> {
    preparation_over(&llm_folder(config, resolve)?, config, resolve)
}

/// The same, where the LLM's folder is known.
pub(crate) fn preparation_over(llm_folder: &Path, config: &TrainConfig, resolve: &Resolve<'_>) -> Result<Preparation> {
    let section = &config.model;
    let side = u32::try_from(section.image_size)?;
    let llm = LlmConfig::open(llm_folder).context("model.llm")?;
    let encoder = |name: &str| {
        let folder = resolve(name)?;
        let config = EncoderConfig::open(&folder)?;
        anyhow::Ok((config.processor(&folder)?, config.patch_size()))
    };
    let (own, patch_size, image_marks) = match section.way()? {
        Way::Vora { patch_size } => {
            let processor = match &section.aux_vision {
                Some(teacher) => encoder(teacher).context("model.aux_vision")?.0,
                None => ImageProcessor::square(side, IMAGENET_DEFAULT.0, IMAGENET_DEFAULT.1, Resample::Bicubic),
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
    let processor = pictures::processor(config, &own, pretrained.as_deref(), resolve)?;
    let has_processor = section.model_type != ModelType::Vora;
    let chat = match config.chat_template() {
        Some(source) => ChatTemplate::new(&source, special_tokens(llm_folder)?, "the run file's chat template")?,
        None => ChatTemplate::open(llm_folder)?,
    };
    let tokenizer = Tokenizer::open(llm_folder)?.for_processor(has_processor);
    let max_length = config.data.train.data_preprocess.clone().unwrap_or_default().max_seq_len;
    let preparation = Preparation::new(tokenizer, chat, llm.vocab_size, processor, usize::try_from(patch_size)?)?;
    Ok(preparation.with_image_marks(image_marks).with_max_length(max_length))
}
