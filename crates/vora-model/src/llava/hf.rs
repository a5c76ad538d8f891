//! What HF's processors need beside a LLaVA's weights, and all who go by them (vLLM, lmms-eval): a token that stands for a picture,
//! and how many of it a picture becomes. An LLM's own tokenizer has none.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vora_image::ImageProcessor;
use vora_text::{ChatTemplate, Tokenizer};

use super::LlavaConfig;
use crate::beside::{CHAT_TEMPLATE, GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER};
use crate::files::to_object;
use crate::model::VisionLanguageModel;
use crate::vora::{HfFiles, generation};

impl HfFiles {
    /// The files for a LLaVA whose adapters are merged; tokenizer, chat template and image processor are those of `folder`. Where its
    /// tokenizer has no token for a picture it gets one, behind all others, and the model's embedding and head a row of zeros for it where
    /// they have none: no text comes to that row, and its logit is 0.
    ///
    /// # Errors
    /// Where `folder` lacks a file, and where its `tokenizer.json` leaves tokens to other files.
    pub fn of_llava(folder: &Path, model: &mut dyn VisionLanguageModel) -> Result<Self> {
        let tokenizer = Tokenizer::open(folder)?;
        let (template, image_token) = ChatTemplate::open(folder)?.with_pictures()?;
        let image_token_id = tokenizer.image_token_id(&image_token);
        let mut files = Vec::new();
        if tokenizer.token_to_id(&image_token).is_none() {
            let json = with_token(folder, &image_token, image_token_id)?;
            files.push((TOKENIZER, serde_json::to_vec(&json)?));
            model.llm_mut().extend_words(image_token_id + 1);
        }
        let mut config = to_object(&model.config_json()?)?;
        let parsed = LlavaConfig::from_json(config.clone())?;
        config.insert("image_token_index".into(), json!(image_token_id));
        let processor = json!({
            "processor_class": "LlavaProcessor",
            "image_token": image_token,
            "patch_size": parsed.vision_config["patch_size"],
            "num_additional_image_tokens": parsed.encoder()?.num_prefix_tokens(),
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        });
        for (name, json) in [
            ("config.json", Value::Object(config)),
            (PREPROCESSOR, ImageProcessor::open(folder)?.to_json()),
            (PROCESSOR, processor),
            (GENERATION, Value::Object(generation(folder, &tokenizer)?)),
        ] {
            files.push((name, serde_json::to_vec_pretty(&json)?));
        }
        files.push((CHAT_TEMPLATE, template.into_bytes()));
        Ok(Self(files))
    }
}

/// `tokenizer.json` with one more token, of this id.
fn with_token(folder: &Path, token: &str, id: i64) -> Result<Value> {
    let path = folder.join(TOKENIZER);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut json: Value = serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let vocab = &json["model"]["vocab"];
    let words = vocab.as_object().map(|words| words.values().filter_map(Value::as_i64).max());
    let words = words.unwrap_or_else(|| vocab.as_array().map(|words| words.len() as i64 - 1)); // Unigram's
    let added = json["added_tokens"].as_array_mut().context("no list `added_tokens`")?;
    let last = added.iter().filter_map(|token| token["id"].as_i64()).chain(words).max();
    ensure!(
        last == Some(id - 1),
        "{} has tokens up to {last:?}, and other files beside it have more, up to {}: `{token}` would not come behind them",
        path.display(),
        id - 1
    );
    added.push(json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
    }));
    Ok(json)
}
