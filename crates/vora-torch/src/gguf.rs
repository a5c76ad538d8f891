//! A language model's GGUF file beside the safetensors of others: its tensors in libtorch's kinds, and what HF's JSON
//! files would say.
//!
//! [`Weights::open`](crate::Weights::open) and [`Checkpoint::open`](crate::safetensors::Checkpoint::open) take such a
//! file or its folder as they take safetensors.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use memmap2::{MmapMut, MmapOptions};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vora_gguf::{Gguf, Llm, TensorKind};

use crate::error;

/// The bytes of a mapped file.
#[derive(Debug, Clone)]
pub(crate) struct Mapped(pub(crate) Arc<MmapMut>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
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

fn read<T>(path: &Path, what: impl FnOnce(&Llm<Mapped>) -> Result<T>) -> Result<Option<T>> {
    let Some(path) = find(path)? else { return Ok(None) };
    let model = open(&map(&path)?).with_context(|| format!("reading {}", path.display()))?;
    what(&model).map(Some).with_context(|| format!("in {}", path.display()))
}

/// Maps a file into memory: privately and writable, so that a view which libtorch writes to by mistake never changes
/// the file.
pub(crate) fn map(path: &Path) -> Result<Arc<MmapMut>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: a private mapping; another process that truncates the file while we read it would end this one
    // with SIGBUS, as it would any program that maps its weights.
    let map = unsafe { MmapOptions::new().map_copy(&file) }
        .with_context(|| format!("cannot map {} into memory", path.display()))?;
    Ok(Arc::new(map))
}

/// The model in a mapped GGUF file.
pub(crate) fn open(map: &Arc<MmapMut>) -> Result<Llm<Mapped>> {
    Gguf::parse(Mapped(Arc::clone(map))).and_then(Llm::new)
}

/// The kind that holds a stored tensor without loss, or with that of f32 arithmetic where it is quantised.
pub(crate) fn kind_of(kind: TensorKind) -> Kind {
    match kind {
        TensorKind::F16 => Kind::Half,
        TensorKind::BF16 => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// A tensor of the model in `kind`, row by row: only the result is ever held whole.
pub(crate) fn dequantise(model: &Llm<Mapped>, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let made = if matches!(kind, Kind::BFloat16 | Kind::Half) { kind } else { Kind::Float };
    let tensor = Tensor::f_empty(shape, (made, Device::Cpu)).map_err(error::clean)?;
    match made {
        Kind::BFloat16 => fill(model, name, &tensor, bf16::from_f32)?,
        Kind::Half => fill(model, name, &tensor, f16::from_f32)?,
        _ => fill(model, name, &tensor, |x| x)?,
    }
    Ok(tensor.to_kind(kind))
}

/// Writes the values into a new contiguous CPU tensor whose elements are `T`s.
fn fill<T: Copy>(model: &Llm<Mapped>, name: &str, tensor: &Tensor, convert: impl Fn(f32) -> T) -> Result<()> {
    assert_eq!(size_of::<T>(), tensor.kind().elt_size_in_bytes(), "T is the element of the tensor's kind");
    // SAFETY: `numel` elements of this size, which nobody else sees yet.
    let out = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) };
    let mut places = out.iter_mut();
    model.read(name, |row| {
        for (&value, place) in row.iter().zip(places.by_ref()) {
            *place = convert(value);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::{Checkpoint, save};
    use crate::weights::{Init, Mismatch, Weights};

    fn golden(name: &str) -> PathBuf {
        fixtures::root().join("golden").join(name)
    }

    #[test]
    fn weights_are_hfs_tensors() {
        for architecture in ["llama", "qwen2", "qwen3"] {
            let path = golden(&format!("gguf_{architecture}.gguf"));
            for (kind, device) in
                [(Kind::Float, Device::Cpu), (Kind::BFloat16, Device::Cpu), (Kind::Double, Device::Cpu)]
            {
                let weights = Weights::open(&path, device, kind).unwrap();
                for (name, expected) in fixtures::open(&format!("gguf_{architecture}")).under("") {
                    let found = weights.get(&name, &expected.size(), Init::Required).unwrap();
                    assert_eq!(found.kind(), kind);
                    fixtures::assert_close_to(&found, &expected.to_kind(kind), 0.0);
                    let trained = weights.parameter(&name, &expected.size(), Init::Required).unwrap();
                    assert!(trained.equal(&expected), "{architecture} {name} as a parameter");
                }
                weights.finish().unwrap();
            }
        }
    }

    #[test]
    fn quantised_tensors_are_rounded_once() {
        let expected = fixtures::open("gguf_file");
        let checkpoint = Checkpoint::open(&golden("gguf_file.gguf")).unwrap();
        let weights = Weights::open(&golden("gguf_file.gguf"), Device::Cpu, Kind::BFloat16).unwrap();
        let mut kinds = Vec::new();
        for (name, expected) in expected.under("hf.") {
            let (kind, shape) = checkpoint.info(&name).unwrap();
            kinds.push(kind);
            assert_eq!(shape, expected.size());
            assert_eq!(checkpoint.tensor(&name).unwrap().kind(), kind, "{name}");
            fixtures::assert_close_to(&weights.get(&name, shape, Init::Required).unwrap(), &expected, 0.0);
        }
        weights.finish().unwrap();
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            assert!(kinds.contains(&kind), "{kind:?} of {kinds:?}");
        }
    }

    #[test]
    fn plain_tensors_are_views_of_the_file() {
        let weights = Weights::open(&golden("gguf_qwen2.gguf"), Device::Cpu, Kind::Float).unwrap();
        let get = || weights.get("model.layers.1.self_attn.q_proj.weight", &[32, 32], Init::Required).unwrap();
        assert_eq!(get().data_ptr(), get().data_ptr());
        // Rows of another order are a copy, and a part of no model is unexpected by its own name.
        let weights = Weights::open(&golden("gguf_llama.gguf"), Device::Cpu, Kind::Float).unwrap();
        let get = || weights.get("model.layers.1.self_attn.q_proj.weight", &[32, 32], Init::Required).unwrap();
        assert_ne!(get().data_ptr(), get().data_ptr());
        let error = weights.finish().unwrap_err();
        let unexpected = &error.downcast_ref::<Mismatch>().unwrap().unexpected;
        let has = |name: &str| unexpected.iter().any(|found| found.contains(name));
        assert!(has("model.norm.weight") && !has("rope_freqs"), "{error}");
    }

    #[test]
    fn a_folder_with_one_file_is_that_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("nor a .gguf file"), "{error}");
        assert!(config(folder.path()).unwrap().is_none());
        fs::copy(golden("gguf_qwen3.gguf"), folder.path().join("model.gguf")).unwrap();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 24);
        assert_eq!(config(folder.path()).unwrap().unwrap()["head_dim"], 16);
        assert_eq!(config(&folder.path().join("model.gguf")).unwrap().unwrap()["model_type"], "qwen3");
        let error = format!("{:#}", tokenizer(folder.path()).unwrap_err());
        assert!(error.contains("model.gguf: there is no metadata `tokenizer.ggml.model`"), "{error}");
        let (json, keys) = tokenizer(&golden("gguf_file.gguf")).unwrap().unwrap();
        assert_eq!((&json["model"]["type"], &keys["eos_token"]), (&"BPE".into(), &"<|im_end|>".into()));

        fs::write(folder.path().join("other.gguf"), "").unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("several GGUF files (model.gguf, other.gguf, ..)"), "{error}");
        // Safetensors go first.
        let tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        save(&folder.path().join("model.safetensors"), &[("w".into(), tensor)], &[]).unwrap();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 1);
        assert!(config(folder.path()).unwrap().is_none());
    }

    #[test]
    fn a_file_cut_at_each_kib_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.gguf");
        let whole = fs::read(golden("gguf_llama.gguf")).unwrap();
        for len in (0..whole.len()).step_by(1024) {
            fs::write(&path, &whole[..len]).unwrap();
            let error = format!("{:#}", Checkpoint::open(&path).unwrap_err());
            assert!(error.contains("cut.gguf"), "{len}: {error}");
        }
        fs::write(&path, "<html>").unwrap();
        let error = format!("{:#}", Checkpoint::open(&path).unwrap_err());
        assert!(error.contains("cut.gguf: this is not a GGUF file"), "{error}");
    }
}
