//! The JSON files of a checkpoint folder, and a GGUF file's word for those that are not there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Gguf, Llm};

/// A JSON file of the folder `path`, else what the GGUF file that `path` is or holds says of the same, else the default.
///
/// # Errors
/// Names the file that cannot be read, or what in it is not as it should be.
pub fn read_json<T: DeserializeOwned + Default>(path: &Path, file: &str) -> Result<T> {
    let json = path.join(file);
    if json.exists() {
        let text = fs::read(&json).with_context(|| format!("cannot read {}", json.display()))?;
        return serde_json::from_slice(&text)
            .with_context(|| format!("{} is not JSON as it should be", json.display()));
    }
    let found = match file {
        "config.json" => config(path)?.map(Value::Object),
        "tokenizer.json" => tokenizer(path)?.map(|(tokenizer, _)| tokenizer),
        // A folder that brings a tokenizer of its own may hold a GGUF file whose tokenizer is of no known kind.
        "tokenizer_config.json" if !path.join("tokenizer.json").exists() => {
            tokenizer(path)?.map(|(_, config)| Value::Object(config))
        }
        _ => None,
    };
    found.map_or_else(|| Ok(T::default()), |found| Ok(serde_json::from_value(found)?))
}

/// [`read_json`] of a file that must be there, and where it was read, for errors.
///
/// # Errors
/// As [`read_json`], and where there is no such file.
pub fn open_json(path: &Path, file: &str) -> Result<(Value, PathBuf)> {
    let json: Value = read_json(path, file)?;
    ensure!(!json.is_null(), "cannot read {}: there is no such file, nor a GGUF file", path.join(file).display());
    Ok((json, origin(path, file)))
}

/// Where [`read_json`] reads: the file, or the GGUF file or its folder.
pub fn origin(path: &Path, file: &str) -> PathBuf {
    let json = path.join(file);
    if json.exists() { json } else { path.to_owned() }
}

/// The GGUF file that `path` is, or the only one in a folder that has no safetensors; none where neither is so.
///
/// # Errors
/// Where a folder has several: which one is meant is for the caller to say.
pub fn find(path: &Path) -> Result<Option<PathBuf>> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension == "gguf");
    if !path.is_dir() {
        return Ok(is_gguf(path).then(|| path.to_owned()));
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
        let file = entry.with_context(|| format!("cannot list {}", path.display()))?.path();
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            return Ok(None);
        }
        if is_gguf(&file) {
            found.push(file);
        }
    }
    found.sort();
    if let [first, second, ..] = found.as_slice() {
        let names = [first, second].map(|file| file.file_name().unwrap_or_default().display().to_string());
        bail!("{} has several GGUF files ({}, ..): name the file", path.display(), names.join(", "));
    }
    Ok(found.pop())
}

/// HF's `config.json` of the GGUF file that `path` is or holds, see [`find`]; none where there is no such file.
///
/// # Errors
/// Names the file, and the metadata that is missing or cannot be said in HF's keys.
pub fn config(path: &Path) -> Result<Option<Map<String, Value>>> {
    read(path, Llm::config)
}

/// HF's `tokenizer.json` and `tokenizer_config.json` (with the chat template in it), as [`config`].
///
/// # Errors
/// Names the file, and the metadata that is missing, or a tokenizer that is no byte-level BPE of a known splitting.
pub fn tokenizer(path: &Path) -> Result<Option<(Value, Map<String, Value>)>> {
    read(path, |model| Ok((model.tokenizer()?, model.tokenizer_config()?)))
}

fn read<T>(path: &Path, what: impl FnOnce(&Llm<Mmap>) -> Result<T>) -> Result<Option<T>> {
    let Some(path) = find(path)? else { return Ok(None) };
    let file = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: read only while this runs; another process that truncates the file meanwhile would end this one with
    // SIGBUS, as it would any program that maps its weights.
    let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {} into memory", path.display()))?;
    let model = Gguf::parse(map).and_then(Llm::new).with_context(|| format!("reading {}", path.display()))?;
    what(&model).map(Some).with_context(|| format!("in {}", path.display()))
}
