//! What was trained, on disk: the adapter as PEFT has it, patch embedding and heads, and what they belong to.
//!
//! A folder of these, a checkpoint or a run's `final/`, is a VoRA without its LLM: [`open`] puts it onto the LLM again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_lora::{AdapterFolder, save_adapter};
use vora_model::{Vora, VoraConfig};
use vora_torch::safetensors::{save, write_atomically};
use vora_torch::{Init, Weights};

use crate::student::Student;

/// Patch embedding and heads, by their names in a VoRA folder.
const VISION: &str = "vision.safetensors";

/// What the LLM's name comes before in a VoRA folder.
const LLM: &str = "llm.";

const PREPROCESSOR: &str = "preprocessor_config.json";

const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The files that a tokenizer and its chat template consist of.
const TOKENIZER: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "generation_config.json",
];

/// Writes everything trained into `folder`, with `config.json`, `preprocessor_config.json` and the tokenizer.
pub fn write(student: &Student, folder: &Path) -> Result<()> {
    let config = student.model.config();
    let lora = config.lora.as_ref().context("the model carries no adapters")?;
    let (adapter, vision): (Vec<_>, Vec<_>) =
        student.parameters().into_iter().partition(|(name, _)| name.starts_with(LLM));
    let adapter: Vec<(String, Tensor)> =
        adapter.into_iter().map(|(name, tensor)| (name[LLM.len()..].to_owned(), tensor)).collect();
    save_adapter(folder, lora, &config.llm_name, &adapter)?;
    save(&folder.join(VISION), &vision, &[])?;
    write_json(&folder.join("config.json"), &config.to_json()?)?;
    write_json(&folder.join(PREPROCESSOR), &student.processor().to_json())?;
    if let Some(source) = student.chat_template() {
        // Read before whatever else a folder says of templates.
        write_atomically(&folder.join(CHAT_TEMPLATE), |file| Ok(std::io::Write::write_all(file, source.as_bytes())?))?;
    }
    let own_template = student.chat_template().is_some();
    let names = TOKENIZER.into_iter().filter(|name| !(own_template && *name == CHAT_TEMPLATE));
    copy_files(names, student.llm_folder(), folder)?;
    Ok(())
}

/// Copies what stands beside a model's weights, tokenizer and image processor, from one of these folders to another.
pub fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    copy_files(TOKENIZER.into_iter().chain([PREPROCESSOR]), from, to)
}

/// Copies those of the named files that `from` has.
fn copy_files(names: impl Iterator<Item = &'static str>, from: &Path, to: &Path) -> Result<()> {
    for name in names {
        let source = from.join(name);
        if source.exists() {
            let bytes = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            write_atomically(&to.join(name), |file| Ok(std::io::Write::write_all(file, &bytes)?))?;
        }
    }
    Ok(())
}

/// Reads everything trained from `folder` back into a student made by the same configuration.
pub fn read(student: &Student, folder: &Path) -> Result<()> {
    if let Some(lora) = &student.model.config().lora {
        AdapterFolder::open(folder)?.expect(lora)?;
    }
    fill(&student.parameters(), folder)
}

/// Opens a VoRA from a folder of [`write()`], its adapters still apart from the weights. `resolve` finds the folder of
/// the LLM by the name that the run knew it by.
pub fn open(folder: &Path, device: Device, kind: Kind, resolve: &dyn Fn(&str) -> Result<PathBuf>) -> Result<Vora> {
    let config = VoraConfig::open(folder)?;
    let llm = resolve(&config.llm_name).with_context(|| format!("the LLM of {}", folder.display()))?;
    let frozen = Weights::open(&llm, device, kind)?;
    let new = Weights::random(0, device, kind);
    let model = Vora::assemble(config, &frozen, &new)?;
    frozen.finish().with_context(|| format!("loading the LLM in {}", llm.display()))?;
    fill(&new.parameters(), folder)?;
    Ok(model)
}

/// Copies saved values into parameters, in place; every one must be there in its shape, and every adapter of the
/// folder must be asked for.
fn fill(parameters: &[(String, Tensor)], folder: &Path) -> Result<()> {
    let adapter = AdapterFolder::open(folder)?.weights(Device::Cpu, Kind::Float)?;
    let vision = Weights::open(&folder.join(VISION), Device::Cpu, Kind::Float)?;
    for (name, parameter) in parameters {
        let value = match name.strip_prefix(LLM) {
            Some(name) => adapter.get(name, &parameter.size(), Init::Required)?,
            None => vision.get(name, &parameter.size(), Init::Required)?,
        };
        tch::no_grad(|| parameter.shallow_clone().copy_(&value));
    }
    adapter.finish()?;
    // A model that is not in training has no heads.
    vision.finish_allowing(|name| name.starts_with("aux_vision."))
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json)?;
    write_atomically(path, |file| Ok(std::io::Write::write_all(file, text.as_bytes())?))
}
