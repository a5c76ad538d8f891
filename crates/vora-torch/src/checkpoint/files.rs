//! Which files a checkpoint is made of.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use vora_files::tell_once;

use crate::checkpoint::error::CheckpointError;

/// The largest index, in bytes: no honest one comes near it.
const MAX_INDEX: usize = 100_000_000;

/// Refuses a file that only Python's unpickler reads.
fn refuse_pickle(path: &Path) -> Result<()> {
    if is_pickle(path) {
        return Err(CheckpointError::Pickle(path.to_owned()).into());
    }
    Ok(())
}

fn is_pickle(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|known| extension == *known))
}

/// The files that make up the checkpoint at `path`.
pub(super) fn checkpoint_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        refuse_pickle(path)?;
        return Ok(vec![path.to_owned()]);
    }
    let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
    if single.exists() {
        // What an earlier save in shards leaves: HF's `save_pretrained` removes the shards and keeps the index.
        if index.exists() {
            tell_once(format!(
                "{} has model.safetensors and model.safetensors.index.json: the single file is read, as transformers \
                 reads it; remove the one that is not meant",
                path.display()
            ));
        }
        return Ok(vec![single]);
    }
    if index.exists() {
        return shards(path, &index);
    }
    let adapter = path.join("adapter_model.safetensors");
    if adapter.exists() {
        return Ok(vec![adapter]);
    }
    if let Some(file) = vora_gguf::folder::find(path)? {
        return Ok(vec![file]);
    }
    let files = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut pickles: Vec<_> = files.flatten().filter(|file| is_pickle(&file.path())).map(|f| f.file_name()).collect();
    pickles.sort();
    if let Some(name) = pickles.first() {
        bail!("{} holds only pickled weights ({}): convert them to safetensors first", path.display(), name.display());
    }
    let files = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut names: Vec<String> = files.flatten().map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let packed =
        names.iter().find(|name| [".safetensors.", ".gguf.", ".tar", ".zip"].iter().any(|part| name.contains(part)));
    if let Some(name) = packed {
        bail!("{} holds weights only in {name}: unpack it first", path.display());
    }
    bail!("{} has neither model.safetensors nor model.safetensors.index.json nor a .gguf file", path.display())
}

/// The files of `folder` that an index names.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", index.display());
    let len = std::fs::metadata(index).with_context(cannot)?.len();
    ensure!(len <= MAX_INDEX as u64, "{} has {len} bytes, at most {MAX_INDEX} are read", index.display());
    let text = std::fs::read(index).with_context(cannot)?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", index.display()))?;
    let map =
        json["weight_map"].as_object().with_context(|| format!("{} has no object `weight_map`", index.display()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .filter(|f| !f.contains(['/', '\\']))
            .with_context(|| format!("{}: tensor `{tensor}` names no file of this folder: {file}", index.display()))?;
        names.push(folder.join(file));
    }
    names.sort();
    names.dedup();
    names.iter().try_for_each(|file| refuse_pickle(file))?;
    Ok(names)
}
