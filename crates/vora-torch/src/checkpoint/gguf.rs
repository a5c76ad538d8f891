//! A language model's GGUF file beside the safetensors of others: its tensors in libtorch's dtypes.
//!
//! [`Weights::open`](crate::weights::Weights::open) and [`Checkpoint::open`](crate::checkpoint::Checkpoint::open) take such a
//! file or its folder as they take safetensors.

use std::sync::Arc;

use anyhow::{Context, Result};
use half::{bf16, f16};
use memmap2::MmapMut;
use tch::{Device, Kind, Tensor};
use vora_gguf::{Gguf, Llm, TensorInfo, TensorKind};

use crate::checkpoint::entry::{Entry, dims};
use crate::error;
use crate::map::Mapped;
use crate::packed::PackedLinear;

/// The tensors of a GGUF file under HF's names.
pub(super) fn entries(model: &Llm<Mapped>) -> Result<Vec<(String, Entry)>> {
    let entry = |name: &str| {
        let info = model.info(name).expect("a name of this file");
        let shape = dims(info.shape()).with_context(|| format!("tensor `{name}`"))?;
        Ok((name.to_owned(), Entry { file_idx: 0, range: model.plain(name), kind: kind_of(info.kind()), shape }))
    };
    model.names().map(entry).collect()
}

/// The model in a mapped GGUF file.
pub(super) fn open(map: &Arc<MmapMut>) -> Result<Llm<Mapped>> {
    Gguf::parse(Mapped(Arc::clone(map))).and_then(Llm::new)
}

/// The dtype that holds a stored tensor without loss, or with that of f32 arithmetic where it is quantised.
fn kind_of(kind: TensorKind) -> Kind {
    match kind {
        TensorKind::F16 => Kind::Half,
        TensorKind::BF16 => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// A tensor of the model in this dtype, row by row: only the result is ever held whole.
pub(super) fn dequantise(model: &Llm<Mapped>, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let made = if matches!(kind, Kind::BFloat16 | Kind::Half) { kind } else { Kind::Float };
    let tensor = Tensor::f_empty(shape, (made, Device::Cpu)).map_err(error::clean)?;
    match made {
        Kind::BFloat16 => fill(model, name, &tensor, bf16::from_f32)?,
        Kind::Half => fill(model, name, &tensor, f16::from_f32)?,
        _ => fill(model, name, &tensor, |x| x)?,
    }
    Ok(tensor.to_kind(kind))
}

/// A matrix `[out, in]` in the blocks that decoding reads, none rounded again; none where it is stored in another way.
pub(super) fn packed(model: &Llm<Mapped>, name: &str, [rows, columns]: [i64; 2]) -> Result<Option<PackedLinear>> {
    let kind = model.info(name).map(TensorInfo::kind);
    let values_kind = match kind {
        Some(TensorKind::Q8_0) => Kind::Int8,
        Some(TensorKind::Q4_0) => Kind::Uint8,
        _ => return Ok(None),
    };
    let Some(blocks) = model.blocks(name) else { return Ok(None) };
    let blocks = Tensor::from_slice(&blocks).f_view([rows, columns / GROUP, -1])?; // a scale of two bytes, then values
    let part = |from, len| blocks.narrow(2, from, len).contiguous();
    let scales = part(0, 2).f_view_dtype(Kind::Half)?.squeeze_dim(2);
    let values = part(2, blocks.size()[2] - 2).f_view_dtype(values_kind)?;
    PackedLinear::from_parts(&values, &scales, columns).map(Some)
}

/// Numbers of a block.
const GROUP: i64 = 32;

/// Writes the values into a new contiguous CPU tensor whose elements are `T`s.
fn fill<T: Send>(model: &Llm<Mapped>, name: &str, tensor: &Tensor, convert: impl Fn(f32) -> T + Sync) -> Result<()> {
    assert_eq!(size_of::<T>(), tensor.kind().elt_size_in_bytes(), "T is the element of the tensor's dtype");
    // SAFETY: `numel` elements of this size, which nobody else has yet.
    let out = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) };
    model.read(name, out, convert)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use vora_gguf::folder;

    use super::*;
    use crate::checkpoint::{Checkpoint, save};
    use crate::map::map;
    use crate::packed::{PackedLinear, Width};
    use crate::weights::{Init, Mismatch, Quantization, Weights};

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
    fn what_is_quantised_is_not_quantised_again() {
        let open = |name: &str| Weights::open(&golden(name), Device::Cpu, Kind::Float).unwrap();
        let error = open("gguf_file.gguf").quantized(Quantization::Nf4).unwrap_err().to_string();
        assert!(
            error.contains("gguf_file.gguf is quantised already, `") && error.contains("f32, f16 or bf16"),
            "{error}"
        );
        assert!(open("gguf_llama.gguf").quantized(Quantization::Nf4).is_ok());
    }

    /// The blocks that decoding reads are the file's own; what is stored otherwise is made whole, as is all of it unless asked.
    #[test]
    fn blocks_that_decoding_reads_are_kept() {
        let path = golden("gguf_file.gguf");
        let model = open(&map(&path).unwrap()).unwrap();
        let plain = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let (kept, trained) = (plain.keeping_blocks(), plain.keeping_blocks().trained());
        let mut found = Vec::new();
        for name in model.names() {
            let (kind, &[rows, columns]) = (model.info(name).unwrap().kind(), model.info(name).unwrap().shape()) else {
                continue;
            };
            let shape = [rows as i64, columns as i64];
            let packed = kept.packed(name, shape).unwrap();
            assert!(plain.packed(name, shape).unwrap().is_none() && trained.packed(name, shape).unwrap().is_none());
            let width = packed.as_ref().map(PackedLinear::width);
            let expected = match kind {
                TensorKind::Q8_0 => Some(Width::Int8),
                TensorKind::Q4_0 => Some(Width::Int4),
                _ => None,
            };
            assert_eq!(width, expected, "{name} in {kind}");
            if let Some(packed) = packed {
                let whole = plain.get(name, &shape, Init::Required).unwrap();
                assert!(packed.dequantise(0..shape[0], Kind::Float).unwrap().equal(&whole), "{name}");
                found.push((kind, name.contains("q_proj"))); // q's rows are put back in order
            }
        }
        for kind in [TensorKind::Q8_0, TensorKind::Q4_0] {
            assert!(found.iter().any(|(of, _)| *of == kind), "{found:?}");
        }
        assert!(kept.keeps_blocks() && !plain.keeps_blocks());
        let whole = Weights::open(&golden("gguf_llama.gguf"), Device::Cpu, Kind::Float).unwrap();
        assert!(!whole.keeping_blocks().keeps_blocks(), "a file without blocks");
    }

    /// Brought into the width that its blocks have already, a matrix keeps its numbers bit for bit.
    #[test]
    fn blocks_of_few_bits_are_kept_as_packed_weights() {
        let path = golden("gguf_file.gguf");
        let model = open(&map(&path).unwrap()).unwrap();
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        for (kind, width) in [(TensorKind::Q8_0, Width::Int8), (TensorKind::Q4_0, Width::Int4)] {
            let of_kind = |name: &&str| model.info(name).unwrap().kind() == kind;
            let names: Vec<&str> = model.names().filter(of_kind).collect();
            assert!(!names.is_empty(), "{kind}");
            for name in names {
                let [rows, columns] = model.info(name).unwrap().shape()[..] else { continue };
                let weight = weights.get(name, &[rows as i64, columns as i64], Init::Required).unwrap();
                let packed =
                    PackedLinear::new(&weight, width).unwrap().dequantise(0..rows as i64, Kind::Float).unwrap();
                assert!(packed.equal(&weight), "{name}");
            }
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
        let dir = tempfile::tempdir().unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("nor a .gguf file"), "{error}");
        assert!(folder::config(dir.path()).unwrap().is_none());
        fs::copy(golden("gguf_qwen3.gguf"), dir.path().join("model.gguf")).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 24);
        assert_eq!(folder::config(dir.path()).unwrap().unwrap()["head_dim"], 16);
        assert_eq!(folder::config(&dir.path().join("model.gguf")).unwrap().unwrap()["model_type"], "qwen3");
        let error = format!("{:#}", folder::tokenizer(dir.path()).unwrap_err());
        assert!(error.contains("model.gguf: there is no metadata `tokenizer.ggml.model`"), "{error}");
        let (json, keys) = folder::tokenizer(&golden("gguf_file.gguf")).unwrap().unwrap();
        assert_eq!((&json["model"]["type"], &keys["eos_token"]), (&"BPE".into(), &"<|im_end|>".into()));

        fs::write(dir.path().join("other.gguf"), "").unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("several GGUF files (model.gguf, other.gguf, ..)"), "{error}");
        // Safetensors go first.
        let tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        save(&dir.path().join("model.safetensors"), &[("w".into(), tensor)], &[]).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 1);
        assert!(folder::config(dir.path()).unwrap().is_none());
    }

    #[test]
    fn a_file_cut_at_each_kib_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cut.gguf");
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
