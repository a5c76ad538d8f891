//! The files of a model's folder, whichever model it is: `config.json` and `model.safetensors`, in and out.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};
use vora_files::write_bytes;
use vora_llm::MODEL_TYPES;
use vora_lora::{ADAPTER_TENSORS, AdapterFolder, LoraConfig};
use vora_torch::checkpoint::save;

/// Finds the folder of a model by the name that a config knows it by.
pub type Resolve<'a> = dyn Fn(&str) -> Result<PathBuf> + 'a;

/// Why a folder is not opened as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// It has no `config.json`, or one that cannot be read.
    #[error("cannot read {}; a model is a folder with config.json in it, or a GGUF file", path.display())]
    NoConfig {
        /// The file that was looked for.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// It is a PEFT adapter's, without what a run writes beside it.
    #[error(
        "{} is an adapter without its model{}: `vora convert` merges the two, and ask, chat and serve take it with the model, as --lora-modules NAME=FOLDER",
        folder.display(),
        base.as_ref().map_or_else(String::new, |base| format!(", {base}"))
    )]
    AdapterAlone {
        /// The folder.
        folder: PathBuf,
        /// The model that it names.
        base: Option<String>,
    },
    /// Its `config.json` names no model known here.
    #[error(
        "model_type of {} is {}, known are vora, llava, chameleon, gemma4_unified, and of language models alone {}",
        path.display(),
        model_type.as_ref().map_or_else(|| "missing".to_owned(), |name| format!("`{name}`")),
        MODEL_TYPES.iter().copied().filter(|name| *name != "chameleon").collect::<Vec<_>>().join(", ")
    )]
    UnknownModelType {
        /// The `config.json`.
        path: PathBuf,
        /// What it says.
        model_type: Option<String>,
    },
}

/// The key of `config.json` that has the ways from its folder to the models that it names: no model's own.
pub(crate) const FROM_HERE: &str = "paths_from_here";

/// The object in `config.json`, or what a GGUF file says in its place, as far as it is of the model.
pub(crate) fn read_config(folder: &Path) -> Result<Map<String, Value>> {
    let mut config = read_raw_config(folder)?;
    config.remove(FROM_HERE);
    Ok(config)
}

/// All of it.
pub(crate) fn read_raw_config(folder: &Path) -> Result<Map<String, Value>> {
    let config: Option<_> = vora_gguf::folder::read_json(folder, "config.json")?;
    if config.is_none() && folder.join(ADAPTER_TENSORS).exists() {
        let base = AdapterFolder::open(folder)?.base_model().map(str::to_owned);
        return Err(FolderError::AdapterAlone { folder: folder.to_owned(), base }.into());
    }
    let missing = || FolderError::NoConfig { path: folder.join("config.json"), source: io::ErrorKind::NotFound.into() };
    Ok(config.ok_or_else(missing)?)
}

/// A config's keys.
pub(crate) fn to_object(value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value)? {
        Value::Object(map) => Ok(map),
        other => bail!("{other} is no JSON object"),
    }
}

/// Reads the key `lora`: merged folders of the published code say `"lora": {}`.
pub(crate) fn lora_or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LoraConfig>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::Object(map) if map.is_empty() => Ok(None),
        value => serde_json::from_value(value).map(Some).map_err(serde::de::Error::custom),
    }
}

/// A dtype as torch and configs call it: `bfloat16`.
pub(crate) fn dtype(kind: Kind) -> String {
    match kind {
        Kind::Float => "float32".to_owned(),
        Kind::Double => "float64".to_owned(),
        Kind::Half => "float16".to_owned(),
        Kind::Int => "int32".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Takes from `auto_map` what names Python files that are not `there`; a class in a repository of the hub stays.
pub(crate) fn keep_auto_map(config: &mut Map<String, Value>, there: impl Fn(&str) -> bool) {
    let Some(Value::Object(map)) = config.get_mut("auto_map") else { return };
    map.retain(|_, class| {
        let module = class.as_str().and_then(|class| class.split_once('.')).map(|(module, _)| module);
        module.is_some_and(|module| module.contains("--") || there(&format!("{module}.py")))
    });
    if map.is_empty() {
        config.remove("auto_map");
    }
}

/// Says a dtype where a config says one, of the whole and of its parts.
pub(crate) fn set_dtype(config: &mut Map<String, Value>, kind: Kind) {
    for (key, value) in config {
        match value {
            Value::Object(part) if ["text_config", "vision_config"].contains(&key.as_str()) => set_dtype(part, kind),
            _ if ["dtype", "torch_dtype"].contains(&key.as_str()) => *value = dtype(kind).into(),
            _ => {}
        }
    }
}

/// The dtype that most numbers have, of those that are no integers: tensors by their dtype and how many numbers they hold.
pub(crate) fn most(tensors: impl Iterator<Item = (Kind, usize)>) -> Option<Kind> {
    let mut numbers = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half].map(|kind| (kind, 0));
    for (kind, more) in tensors {
        numbers.iter_mut().filter(|(known, _)| *known == kind).for_each(|(_, numbers)| *numbers += more);
    }
    numbers.into_iter().max_by_key(|(_, numbers)| *numbers).filter(|(_, numbers)| *numbers > 0).map(|(kind, _)| kind)
}

/// `config.json` and `model.safetensors`, each written beside its place and renamed. The config's dtype is that of the tensors.
pub(crate) fn save_folder(folder: &Path, config: &Value, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut config = config.clone();
    let kind = most(tensors.iter().map(|(_, tensor)| (tensor.kind(), tensor.numel())));
    if let (Value::Object(config), Some(kind)) = (&mut config, kind) {
        set_dtype(config, kind);
    }
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    save(&folder.join("model.safetensors"), tensors, &[])?;
    write_bytes(&folder.join("config.json"), &serde_json::to_vec_pretty(&config)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_configs_dtype_is_that_of_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let config =
            serde_json::json!({"torch_dtype": "float16", "text_config": {"dtype": "float16", "hidden_size": 4}});
        let tensors = [Kind::BFloat16, Kind::Float, Kind::Int64].map(|kind| {
            let rows = if kind == Kind::Float { 1 } else { 4 };
            (format!("{kind:?}"), Tensor::zeros([rows, 4], (kind, Device::Cpu)))
        });
        save_folder(folder.path(), &config, &tensors).unwrap();
        let written = read_config(folder.path()).unwrap();
        assert_eq!(
            (&written["torch_dtype"], &written["text_config"]["dtype"]),
            (&"bfloat16".into(), &"bfloat16".into())
        );
        assert_eq!(written["text_config"]["hidden_size"], 4);
    }
}
