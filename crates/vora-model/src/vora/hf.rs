//! The files by which HF transformers opens a VoRA's folder with its `Auto` classes and `trust_remote_code`: the code of
//! its three classes, and what they read beside it.
//!
//! The folder keeps the layout and names of the published VoRA models, whose code is of transformers 4.50; this one is
//! our own, checked with 5.23.0 (`fixtures/generate/hf_vora.py`).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tch::Kind;
use vora_files::write_bytes;
use vora_image::ImageProcessor;
use vora_text::{ChatTemplate, Tokenizer};

use crate::beside::{CHAT_TEMPLATE, GENERATION, PREPROCESSOR, PROCESSOR};
use crate::files::{dtype, to_object};

use super::config::IMAGE_TOKEN_ID;

/// The code, by the names that the published folders have for it.
const CODE: [(&str, &str); 3] = [
    ("configuration_vora.py", include_str!("hf/configuration_vora.py")),
    ("modeling_vora.py", include_str!("hf/modeling_vora.py")),
    ("processing_vora.py", include_str!("hf/processing_vora.py")),
];

/// The files that a VoRA's folder gets for HF transformers, by name.
#[derive(Debug)]
pub struct HfFiles(Vec<(&'static str, Vec<u8>)>);

impl HfFiles {
    /// The files for a merged VoRA of this `config.json`, whose LLM is stored as `kind`; tokenizer, chat template and image
    /// processor are those of `folder`.
    ///
    /// # Errors
    /// Where the config is no VoRA's or names adapters that are not merged, `folder` lacks a file, or its image processor
    /// is one whose pictures no array of pixels holds.
    pub fn new(folder: &Path, config: &Value, kind: Kind) -> Result<Self> {
        let mut config = to_object(config)?;
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        ensure!(
            model_type == "vora",
            "{} is a `{model_type}`: transformers has its class already, --hf is for a VoRA",
            folder.display()
        );
        let is_apart = config.get("lora").is_some_and(|lora| lora["r"].as_i64().is_some_and(|r| r >= 0));
        ensure!(
            !is_apart,
            "{} has adapters beside its weights, which no class of transformers folds in; merge them with `vora merge`",
            folder.display()
        );
        let rows = config["vocab_size"].as_i64().context("config.json has no `vocab_size`")?;
        let tokenizer = Tokenizer::open(folder)?.for_embedding(rows);
        let (template, image_token) = ChatTemplate::open(folder)?.with_pictures()?;
        let image_token_id = tokenizer.image_token_id(&image_token);
        let processor = ImageProcessor::open(folder)?.to_json();
        if processor["image_processor_type"] == "Siglip2ImageProcessor" {
            bail!(
                "the image processor of {} makes as many whole patches as fit (SigLIP 2's NaFlex), for which --hf has no \
                 class; give preprocessor_config.json a `size`",
                folder.display()
            );
        }
        let mut generation = generation(folder)?;
        let eos_ids = tokenizer.eos_ids();
        ensure!(!eos_ids.is_empty(), "{} names no token that ends an answer (eos_token_id)", folder.display());
        generation.insert("eos_token_id".into(), json!(eos_ids));
        generation.entry("pad_token_id").or_insert_with(|| json!(eos_ids[0]));
        let patch_size = config["patch_size"].clone();
        config.insert(IMAGE_TOKEN_ID.into(), json!(image_token_id));
        config.insert("architectures".into(), json!(["VoRAForCausalLM"]));
        config.insert("auto_map".into(), auto_map());
        config.remove("torch_dtype");
        config.insert("dtype".into(), json!(dtype(kind)));
        let mut in_processor = json!({
            "processor_class": "VoRAProcessor",
            "auto_map": {"AutoProcessor": "processing_vora.VoRAProcessor"},
            "patch_size": patch_size,
            "image_token": image_token,
            "image_token_id": image_token_id,
        });
        for (key, value) in
            [("image_backend", &processor["backend"]), ("background_color", &processor["background_color"])]
        {
            if !value.is_null() {
                in_processor[key] = value.clone();
            }
        }
        let mut files: Vec<_> = CODE.map(|(name, code)| (name, code.as_bytes().to_vec())).into();
        for (name, json) in [
            ("config.json", Value::Object(config)),
            (PREPROCESSOR, processor),
            (PROCESSOR, in_processor),
            (GENERATION, Value::Object(generation)),
        ] {
            files.push((name, serde_json::to_vec_pretty(&json)?));
        }
        files.push((CHAT_TEMPLATE, template.into_bytes()));
        Ok(Self(files))
    }

    /// An error where `folder` has one of the files already that no model's folder has without being asked for it.
    ///
    /// # Errors
    /// Names the file.
    pub fn ensure_vacant(folder: &Path) -> Result<()> {
        let there = CODE.iter().map(|(name, _)| *name).chain([PROCESSOR]).find(|name| folder.join(name).exists());
        ensure!(
            there.is_none(),
            "{} is there already, and --hf would write it; choose another folder",
            folder.join(there.unwrap_or_default()).display()
        );
        Ok(())
    }

    /// Their names and bytes.
    pub(crate) fn into_files(self) -> impl Iterator<Item = (&'static str, Vec<u8>)> {
        self.0.into_iter()
    }

    /// Writes them into `folder`, over what it has of these names.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.0.iter().try_for_each(|(name, bytes)| write_bytes(&folder.join(name), bytes))
    }
}

/// Which class of the code each of the `Auto` classes takes.
fn auto_map() -> Value {
    json!({
        "AutoConfig": "configuration_vora.VoRAConfig",
        "AutoModelForCausalLM": "modeling_vora.VoRAForCausalLM",
        "AutoModelForImageTextToText": "modeling_vora.VoRAForCausalLM",
        "AutoProcessor": "processing_vora.VoRAProcessor",
    })
}

/// What the folder says about generation already.
fn generation(folder: &Path) -> Result<Map<String, Value>> {
    let path = folder.join(GENERATION);
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not a JSON object", path.display()))
}
