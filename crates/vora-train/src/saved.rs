//! What was trained, on disk: the adapter as PEFT has it, an LLM trained whole, what sees, and what they belong to.
//!
//! A folder of these, a checkpoint or a run's `final/`, is a model without what stayed frozen: [`vora_model::open`] puts
//! the two together again. Of a VoRA all of whose weights were trained, it is the whole model, as `vora merge` would write it.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use vora_lora::{LoraConfig, save_adapter};
use vora_model::trained::{self, LLM, MODEL, Parts, VISION};
use vora_torch::safetensors::{Checkpoint, save, write_bytes};
use vora_vision::ImageProcessor;

use crate::student::{Resolve, Student};

const CONFIG: &str = "config.json";

const PREPROCESSOR: &str = "preprocessor_config.json";

const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The files that a tokenizer and its chat template consist of.
const TOKENIZER: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "generation_config.json",
];

/// Everything that a run made or trained.
fn parts_of(student: &Student) -> Result<Parts> {
    if student.is_whole() {
        let heads = student.parameters().into_iter().filter(|(name, _)| name.starts_with("aux_vision."));
        let whole = student.model.tensors()?.into_iter().chain(heads).collect();
        return Ok(Parts { whole, ..Parts::default() });
    }
    let made = student.made().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
    let mut parts = Parts::of(student.parameters(), student.model.llm_prefix());
    parts.vision.extend(made);
    Ok(parts)
}

/// Everything trained as it was at one moment, copied to the host: it is written while the training goes on.
pub struct Snapshot {
    parts: Parts,
    lora: Option<LoraConfig>,
    llm_name: String,
    llm_folder: PathBuf,
    config: Value,
    preprocessor: Value,
    chat_template: Option<String>,
}

impl Snapshot {
    /// Copies what `student` has by now.
    pub fn of(student: &Student) -> Result<Self> {
        let Parts { adapter, llm, vision, whole } = parts_of(student)?;
        Ok(Self {
            parts: Parts {
                adapter: on_host(adapter),
                llm: on_host(llm),
                vision: on_host(vision),
                whole: on_host(whole),
            },
            lora: student.model.lora().cloned(),
            llm_name: student.llm_name().to_owned(),
            llm_folder: student.preparation().llm_folder.clone(),
            config: student.model.config_json()?,
            preprocessor: student.preparation().processor.to_json(),
            chat_template: student.chat_template().map(str::to_owned),
        })
    }

    /// Writes it into `folder`, with `config.json`, `preprocessor_config.json` and the tokenizer.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if let Some(lora) = &self.lora {
            save_adapter(folder, lora, &self.llm_name, &self.parts.adapter)?;
        }
        let parts = &self.parts;
        for (tensors, file) in [(&parts.llm, LLM), (&parts.vision, VISION), (&parts.whole, MODEL)] {
            if !tensors.is_empty() {
                save(&folder.join(file), tensors, &[])?;
            }
        }
        write_json(&folder.join(CONFIG), &self.config)?;
        write_json(&folder.join(PREPROCESSOR), &self.preprocessor)?;
        if let Some(source) = &self.chat_template {
            // Read before whatever else a folder says of templates.
            write_bytes(&folder.join(CHAT_TEMPLATE), source.as_bytes())?;
        }
        let own_template = self.chat_template.is_some();
        let names = TOKENIZER.into_iter().filter(|name| !(own_template && *name == CHAT_TEMPLATE));
        copy_files(names, &self.llm_folder, folder)?;
        match self.config["vocabulary_map"].as_object() {
            Some(vocabulary) => name_tokens(&folder.join(TOKENIZER[0]), vocabulary),
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

/// Takes what stands beside a model's weights from one of these folders to another: the tokenizer's files as they are,
/// and the image processor as it is read there, as other files of the folder may say something of it too.
pub fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    copy_files(TOKENIZER.into_iter(), from, to)?;
    if ImageProcessor::is_stored(from)? {
        write_json(&to.join(PREPROCESSOR), &ImageProcessor::open(from)?.to_json())?;
    }
    Ok(())
}

/// Copies those of the named files that `from` has.
fn copy_files(names: impl Iterator<Item = &'static str>, from: &Path, to: &Path) -> Result<()> {
    for name in names {
        let source = from.join(name);
        if source.exists() {
            let bytes = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            write_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// Reads everything trained from `folder` back into a student made by the same configuration.
pub fn read(student: &Student, folder: &Path) -> Result<()> {
    trained::expect(folder, student.model.lora())?;
    parts_of(student)?.fill_from(folder)
}

/// Starts what sees from what another run trained, in `folder`, its `final/`: LLaVA's second stage from its first.
pub fn start_from(student: &Student, folder: &Path) -> Result<()> {
    let Parts { vision, .. } = Parts::of(student.parameters(), student.model.llm_prefix());
    Parts { vision, ..Parts::default() }.fill_from(folder)
}

/// An error where a folder is none that [`start_from`] can take.
pub(crate) fn ensure_saved(folder: &Path) -> Result<()> {
    ensure!(trained::is_part(folder), "{} has no {VISION}; it takes a run's final/", folder.display());
    Ok(())
}

/// The teacher's heads in a folder of [`Snapshot::write`], by their names there; a model that was merged has none.
pub(crate) fn heads(folder: &Path) -> Result<Vec<(String, Tensor)>> {
    let path = if is_whole(folder) { folder.to_owned() } else { folder.join(VISION) };
    let checkpoint = Checkpoint::open(&path)?;
    let names = checkpoint.names().filter(|name| name.starts_with("aux_vision."));
    names.map(|name| Ok((name.to_owned(), checkpoint.tensor(name)?))).collect()
}

/// Whether a folder has all of a model's weights, in one file or in several.
fn is_whole(folder: &Path) -> bool {
    [MODEL, "model.safetensors.index.json"].iter().any(|file| folder.join(file).exists())
}

/// The kind that the LLM of a folder of [`Snapshot::write`] is stored in: its own folder's, or f32 where it was trained.
pub fn stored_kind(folder: &Path, resolve: &Resolve<'_>) -> Result<Kind> {
    let path =
        if is_whole(folder) { folder.to_owned() } else { trained::llm_path(folder, &read_config(folder)?, resolve)? };
    let checkpoint = Checkpoint::open(&path)?;
    let norm = ["model.norm.weight", "llm.model.norm.weight", "norm.weight"]
        .into_iter()
        .find_map(|name| checkpoint.info(name));
    let kind = norm.map(|(kind, _)| kind);
    kind.with_context(|| format!("{} has no model.norm.weight", path.display()))
}

/// What `config.json` says.
fn read_config(folder: &Path) -> Result<Map<String, Value>> {
    let path = folder.join(CONFIG);
    let bytes = fs::read(&path).with_context(|| {
        format!("cannot read {}; what was trained lies in a run's final/ and its checkpoints", path.display())
    })?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not a JSON object", path.display()))
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    write_bytes(path, serde_json::to_string_pretty(json)?.as_bytes())
}
