//! A run's [`Preparation`], from its run file and its models' configs without their weights.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use vora_data::Preparation;
use vora_model::{Resolve, llm_config};
use vora_recipe::{ModelType, TrainConfig};
use vora_text::{ChatTemplate, Tokenizer, special_tokens};

use crate::pictures::Pictures;

/// Where the LLM of a run lies.
///
/// # Errors
/// Where its name leads nowhere.
pub fn llm_folder(config: &TrainConfig, resolve: &Resolve<'_>) -> Result<PathBuf> {
    resolve(&config.model.llm).context("model.llm")
}

/// The preparation of a run; its models are not opened for it.
///
/// # Errors
/// Names the key, and the file, that does not fit.
pub fn preparation(config: &TrainConfig, resolve: &Resolve<'_>) -> Result<Preparation> {
    let llm_folder = llm_folder(config, resolve)?;
    let pictures = Pictures::open(config, &llm_folder, resolve)?;
    preparation_over(&llm_folder, &pictures, config.model.model_type != ModelType::Vora, config)
}

/// The same, where the LLM's folder and the pictures' side of it are known.
pub(crate) fn preparation_over(
    llm_folder: &Path,
    pictures: &Pictures,
    has_processor: bool,
    config: &TrainConfig,
) -> Result<Preparation> {
    let llm = llm_config(llm_folder).context("model.llm")?;
    let chat = match config.chat_template() {
        Some(source) => ChatTemplate::new(&source, special_tokens(llm_folder)?, "the run file's chat template")?,
        None => ChatTemplate::open(llm_folder)?,
    };
    let tokenizer = Tokenizer::open(llm_folder)?.for_processor(has_processor);
    let preprocess = config.data.train.data_preprocess.clone().unwrap_or_default();
    let context = usize::try_from(llm.max_position_embeddings)?;
    if let Some(given) = preprocess.max_seq_len.filter(|_| !config.data.train.packing) {
        ensure!(
            given <= context,
            "data.train.data_preprocess.max_seq_len is {given}, but the LLM was made for {context} tokens \
             (max_position_embeddings of {}): set it to {context} or less",
            llm_folder.display()
        );
    }
    let preparation = Preparation::new(
        tokenizer,
        chat,
        llm.vocab_size,
        pictures.processor.clone(),
        usize::try_from(pictures.patch_size)?,
    )?;
    Ok(preparation
        .with_image_marks(pictures.image_marks)
        .with_max_length(preprocess.max_length())
        .with_max_positions(context))
}
