//! The trained part of a model on disk: PEFT adapter, an LLM trained whole, vision weights, config.
//!
//! A folder of these, a checkpoint or a run's `final/`, is a model without what stayed frozen: [`vora_model::open`] puts
//! the two together again. Of a VoRA all of whose weights were trained, it is the whole model, as `vora merge` would write it.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};
use vora_files::write_bytes;
use vora_lora::{BaseModel, LoraConfig, save_adapter};
use vora_model::beside::{CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER, copy_text_files, text_files};
use vora_model::named;
use vora_model::trained::{LLM, MODEL, Parts, VISION};
use vora_torch::checkpoint::save;

use vora_student::Student;
use vora_student::parts::parts_of;

const CONFIG: &str = "config.json";

/// Everything trained as it was at one moment, copied to the host: it is written while the training goes on.
pub struct Snapshot {
    parts: Parts,
    adapter: Option<LoraConfig>,
    adapts_llm_alone: bool,
    llm_name: String,
    llm_folder: PathBuf,
    config: Value,
    preprocessor: Value,
    chat_template: Option<String>,
}

impl Snapshot {
    /// Copies what `student` has by now.
    ///
    /// # Errors
    /// Where the model's config cannot be said in JSON.
    pub fn of(student: &Student) -> Result<Self> {
        Ok(Self {
            parts: parts_of(student)?.map(on_host),
            adapter: student.model.peft_config()?,
            adapts_llm_alone: student.model.adapts_llm_alone(),
            llm_name: student.llm_name().to_owned(),
            llm_folder: student.llm_folder().to_owned(),
            config: student.model.config_json()?,
            preprocessor: student.pictures().processor.to_json(),
            chat_template: student.chat_template().map(str::to_owned),
        })
    }

    /// Writes it into `folder`, with `config.json`, `preprocessor_config.json` and the tokenizer.
    ///
    /// # Errors
    /// Where a file cannot be read from the LLM's folder or not be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if let Some(config) = &self.adapter {
            let llm = named::whole_path(&self.llm_name);
            let base = if self.adapts_llm_alone { BaseModel::causal_lm(&llm) } else { BaseModel::new(&llm) };
            save_adapter(folder, config, base, &self.parts.adapter)?;
        }
        let parts = &self.parts;
        for (tensors, file) in [(&parts.llm, LLM), (&parts.vision, VISION), (&parts.whole, MODEL)] {
            if !tensors.is_empty() {
                save(&folder.join(file), tensors, &[])?;
            }
        }
        let mut config = self.config.clone();
        named::name_paths(&mut config, folder);
        write_json(&folder.join(CONFIG), &config)?;
        write_json(&folder.join(PREPROCESSOR), &self.preprocessor)?;
        if let Some(source) = &self.chat_template {
            // Read before whatever else a folder says of templates.
            write_bytes(&folder.join(CHAT_TEMPLATE), source.as_bytes())?;
        }
        let own_template = self.chat_template.is_some();
        let names = text_files().filter(|name| !(own_template && *name == CHAT_TEMPLATE));
        copy_text_files(names, &self.llm_folder, folder)?;
        match self.config["vocabulary_map"].as_object() {
            Some(vocabulary) => name_tokens(&folder.join(TOKENIZER), vocabulary),
            None => Ok(()),
        }
    }
}

/// Adds the tokens of a Chameleon's `vocabulary_map` to its `tokenizer.json`, those that the LLM's tokenizer has not, as
/// special ones: HF's processor looks up `<image>` there, and text that is decoded leaves pictures out.
fn name_tokens(tokenizer: &Path, vocabulary: &Map<String, Value>) -> Result<()> {
    let read = || anyhow::Ok(serde_json::from_slice::<Value>(&fs::read(tokenizer)?)?);
    let mut json = read().with_context(|| format!("cannot read {}", tokenizer.display()))?;
    let added = json["added_tokens"].as_array().cloned().unwrap_or_default();
    let known: HashSet<&str> = added.iter().filter_map(|token| token["content"].as_str()).collect();
    let is_new = |name: &str| !known.contains(name) && json["model"]["vocab"].get(name).is_none();
    let mut new: Vec<(&str, u64)> =
        vocabulary.iter().filter_map(|(name, id)| Some((name.as_str(), id.as_u64()?))).collect();
    new.retain(|(name, _)| is_new(name));
    new.sort_unstable_by_key(|(_, id)| *id);
    if new.is_empty() {
        return Ok(());
    }
    let token = |(name, id): (&str, u64)| {
        json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let tokens = added.iter().cloned().chain(new.into_iter().map(token)).collect();
    json["added_tokens"] = Value::Array(tokens);
    write_bytes(tokenizer, &serde_json::to_vec_pretty(&json)?)
}

/// Copies that no later step changes, in the memory of the host.
pub fn on_host(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    let copy = |tensor: Tensor| match tensor.device() {
        Device::Cpu => tensor.detach().copy(),
        _ => tensor.detach().to_device(Device::Cpu),
    };
    tensors.into_iter().map(|(name, tensor)| (name, copy(tensor))).collect()
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    write_bytes(path, serde_json::to_string_pretty(json)?.as_bytes())
}
