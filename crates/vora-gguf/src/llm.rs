//! A language model in a GGUF file, its tensors under HF's names and in HF's order of rows.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use crate::file::{Gguf, TensorInfo};

/// `general.architecture`, where it is one whose blocks are Llama's; Mistral's files say `llama`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    SmolLm3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::SmolLm3];

    /// As it stands in the file, and HF's `model_type`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
        }
    }

    /// That of HF's `model_type`.
    pub(crate) fn of_model_type(model_type: &str) -> Option<Self> {
        let name = if model_type == "mistral" { "llama" } else { model_type };
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// Whether llama.cpp's converter reorders the rows of q and k: its `LlamaModel` does, from which SmolLM3's derives.
    pub(crate) fn permutes(self) -> bool {
        matches!(self, Self::Llama | Self::SmolLm3)
    }
}

/// Where a tensor of HF's name is found.
#[derive(Debug)]
struct Place {
    name: String,         // in the GGUF file
    heads: Option<usize>, // of the rows that llama.cpp reordered
}

/// A language model over the bytes `B` of its file.
///
/// Names that are no part of a Llama-like block stay as they are in the file, so that whoever builds the model can tell
/// them; `rope_freqs.weight` alone is hidden, which [`Llm::config`] speaks for.
#[derive(Debug)]
pub struct Llm<B> {
    file: Gguf<B>,
    architecture: Architecture,
    tensors: BTreeMap<String, Place>,
}

/// Factors of the rotary frequencies, which HF has in its config.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";

impl<B: AsRef<[u8]>> Llm<B> {
    /// Takes a parsed file.
    ///
    /// # Errors
    /// Where the file holds no language model, only a part of one, or an architecture that is not Llama-like.
    pub fn new(file: Gguf<B>) -> Result<Self> {
        if file.has("general.type") {
            let found = file.text("general.type")?;
            ensure!(found == "model", "general.type is `{found}`, expected `model`");
        }
        if file.has("split.count") {
            let count = file.unsigned("split.count")?;
            ensure!(count <= 1, "this is one of {count} parts of a model: join them first (llama-gguf-split --merge)");
        }
        let found = file.text("general.architecture")?;
        let Some(architecture) = Architecture::ALL.into_iter().find(|known| known.name() == found) else {
            let known = Architecture::ALL.map(Architecture::name).join(", ");
            bail!("general.architecture is `{found}`, known are {known}");
        };
        let mut model = Self { file, architecture, tensors: BTreeMap::new() };
        let names: Vec<String> = model.file.names().filter(|name| *name != ROPE_FREQS).map(str::to_owned).collect();
        for name in names {
            let heads = model.permuted_heads(&name)?;
            let hf_name = hf_name(&name).unwrap_or_else(|| name.clone());
            if let Some(other) = model.tensors.insert(hf_name.clone(), Place { name: name.clone(), heads }) {
                bail!("tensors `{}` and `{name}` are both HF's `{hf_name}`", other.name);
            }
        }
        Ok(model)
    }

    /// The file under it.
    pub fn file(&self) -> &Gguf<B> {
        &self.file
    }

    pub(crate) fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// HF's names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What the header says of the tensor of that HF name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.file.info(&self.tensors.get(name)?.name)
    }

    /// The bytes of the file that hold the tensor as it is: plain numbers in HF's order. None where it has to be read.
    pub fn plain(&self, name: &str) -> Option<Range<usize>> {
        let (place, info) = (self.tensors.get(name)?, self.info(name)?);
        (place.heads.is_none() && info.kind().block().0 == 1).then(|| info.range())
    }

    /// Writes the values of a tensor into `out` in HF's order, each as `convert` has it. The cores share the rows; of each
    /// core's part no more than a row is ever held in f32.
    ///
    /// # Errors
    /// Where there is no such tensor, or `out` has not as many places as it has values.
    pub fn read<T: Send>(&self, name: &str, out: &mut [T], convert: impl Fn(f32) -> T + Sync) -> Result<()>
    where
        B: Sync,
    {
        let place = self.tensors.get(name).with_context(|| format!("there is no tensor `{name}`"))?;
        let info = self.file.info(&place.name).expect("a name of this file");
        let (rows, width) = rows(info, place.heads.is_some());
        let values = rows * width;
        ensure!(out.len() == values, "tensor `{name}` has {values} values, there are places for {}", out.len());
        let (block_len, block_bytes) = info.kind().block();
        let (raw, row_bytes) = (self.file.raw(info), width / block_len * block_bytes);
        let part_rows = (PART / width.max(1)).max(1);
        out.par_chunks_mut((part_rows * width).max(1)).enumerate().for_each(|(part, out)| {
            let mut values = Vec::with_capacity(width);
            for (row, out) in (part * part_rows..).zip(out.chunks_mut(width)) {
                let row = place.heads.map_or(row, |heads| stored_row(row, rows / heads));
                values.clear();
                info.kind().dequantise(&raw[row * row_bytes..][..row_bytes], &mut values);
                out.iter_mut().zip(&values).for_each(|(out, value)| *out = convert(*value));
            }
        });
        Ok(())
    }

    /// The blocks of few bits that hold a matrix `[rows, width]`, in HF's order of rows, as they lie in the file. None where its
    /// values are plain numbers, or where it is no matrix of whole blocks.
    pub fn blocks(&self, name: &str) -> Option<Vec<u8>> {
        let (place, info) = (self.tensors.get(name)?, self.info(name)?);
        let (block_len, block_bytes) = info.kind().block();
        if block_len == 1 || info.shape().len() != 2 || info.shape()[1] % block_len != 0 {
            return None;
        }
        let (rows, width) = rows(info, place.heads.is_some());
        let (raw, row_bytes) = (self.file.raw(info), width / block_len * block_bytes);
        let Some(heads) = place.heads else { return Some(raw.to_vec()) };
        let of_row = |row: usize| &raw[stored_row(row, rows / heads) * row_bytes..][..row_bytes];
        Some((0..rows).flat_map(of_row).copied().collect())
    }

    /// All values of a tensor in HF's order.
    ///
    /// # Errors
    /// Where there is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Vec<f32>>
    where
        B: Sync,
    {
        let len = self.info(name).map_or(0, |info| info.shape().iter().product());
        let mut values = vec![0.0; len];
        self.read(name, &mut values, |value| value)?;
        Ok(values)
    }

    /// The heads by which the rows of this tensor have to be put back.
    fn permuted_heads(&self, name: &str) -> Result<Option<usize>> {
        let heads = match name.split('.').nth(2) {
            Some("attn_q") => self.heads()?,
            Some("attn_k") => self.kv_heads()?,
            _ => return Ok(None),
        };
        if !self.architecture.permutes() {
            return Ok(None);
        }
        let (heads, info) = (usize::try_from(heads)?, self.file.info(name).expect("a name of this file"));
        let (rows, width) = rows(info, true);
        let splits = heads > 0 && rows % heads == 0 && rows / heads % 2 == 0;
        ensure!(splits, "tensor `{name}` has {rows} rows, which do not split into {heads} heads with two halves each");
        ensure!(
            width % info.kind().block().0 == 0,
            "tensor `{name}` is of kind {}, whose blocks span its heads",
            info.kind()
        );
        Ok(Some(heads))
    }

    /// A metadata key of this architecture: `llama.KEY`.
    pub(crate) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name())
    }

    pub(crate) fn heads(&self) -> Result<u64> {
        self.file.unsigned(&self.key("attention.head_count"))
    }

    pub(crate) fn kv_heads(&self) -> Result<u64> {
        let key = self.key("attention.head_count_kv");
        if self.file.has(&key) { self.file.unsigned(&key) } else { self.heads() }
    }
}

/// Values that one core takes at a time: enough that sharing them out costs nothing beside reading them; in tests few,
/// so that small tensors have several parts too.
const PART: usize = if cfg!(test) { 100 } else { 1 << 16 };

/// Rows and their length; a bias is a row of one for each output where its order matters, else one row.
fn rows(info: &TensorInfo, permuted: bool) -> (usize, usize) {
    let shape = info.shape();
    let width = if permuted && shape.len() == 1 { 1 } else { shape.last().copied().unwrap_or(1) };
    (shape.iter().product::<usize>() / width, width)
}

/// The row of the file that is row `row` of q or k in HF's model.
///
/// Within a head llama.cpp has the two halves of a rotated pair side by side, row `2 * pair + half`; HF has the halves
/// one after the other, row `half * head_dim / 2 + pair`.
pub(crate) fn stored_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    let (half, pair) = (row / (head_dim / 2), row % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// The modules of a Llama-like model, and those of its blocks: in the file, and in HF's model.
const MODULES: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const IN_BLOCKS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// HF's name of a tensor of a Llama-like model.
fn hf_name(name: &str) -> Option<String> {
    let find =
        |pairs: &[(&str, &'static str)], name: &str| pairs.iter().find(|(own, _)| *own == name).map(|(_, hf)| *hf);
    let (module, end) = name.rsplit_once('.')?;
    let module = match find(&MODULES, module) {
        Some(module) => module.to_owned(),
        None => {
            let (layer, part) = module.strip_prefix("blk.")?.split_once('.')?;
            format!("model.layers.{layer}.{}", find(&IN_BLOCKS, part)?)
        }
    };
    matches!(end, "weight" | "bias").then(|| format!("{module}.{end}"))
}

/// The file's name of a tensor of HF's Llama-like model.
pub(crate) fn gguf_name(hf_name: &str) -> Option<String> {
    let find =
        |pairs: &[(&'static str, &str)], name: &str| pairs.iter().find(|(_, hf)| *hf == name).map(|(own, _)| *own);
    let (module, end) = hf_name.rsplit_once('.')?;
    let module = match find(&MODULES, module) {
        Some(module) => module.to_owned(),
        None => {
            let (layer, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
            format!("blk.{layer}.{}", find(&IN_BLOCKS, part)?)
        }
    };
    matches!(end, "weight" | "bias").then(|| format!("{module}.{end}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use safetensors::SafeTensors;

    /// The tiny models of `fixtures/generate/gguf_file.py`: file, HF's own tensors.
    pub(crate) const MODELS: [(&str, &[u8], &[u8]); 3] = [
        (
            "llama",
            include_bytes!("../../../fixtures/golden/gguf_llama.gguf"),
            include_bytes!("../../../fixtures/golden/gguf_llama.safetensors"),
        ),
        (
            "qwen2",
            include_bytes!("../../../fixtures/golden/gguf_qwen2.gguf"),
            include_bytes!("../../../fixtures/golden/gguf_qwen2.safetensors"),
        ),
        (
            "qwen3",
            include_bytes!("../../../fixtures/golden/gguf_qwen3.gguf"),
            include_bytes!("../../../fixtures/golden/gguf_qwen3.safetensors"),
        ),
    ];

    #[test]
    fn tensors_are_those_of_hf() {
        for (architecture, file, golden) in MODELS {
            let model = Llm::new(Gguf::parse(file).unwrap()).unwrap();
            let golden = SafeTensors::deserialize(golden).unwrap();
            let mut expected: Vec<&str> = golden.names();
            expected.sort_unstable();
            assert_eq!(model.names().collect::<Vec<_>>(), expected, "{architecture}");
            let mut whole = 0;
            for name in expected {
                let tensor = golden.tensor(name).unwrap();
                assert_eq!(model.info(name).unwrap().shape(), tensor.shape(), "{architecture} {name}");
                let bytes: Vec<u8> = model.tensor(name).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
                assert!(bytes == tensor.data(), "{architecture} {name}");
                let error = model.read(name, &mut [0f32; 7], |value| value).unwrap_err().to_string();
                assert!(error.ends_with("there are places for 7"), "{error}");
                if let Some(range) = model.plain(name) {
                    assert!(&file[range] == tensor.data(), "{architecture} {name}");
                    whole += 1;
                }
            }
            // Weights and biases of q and k in two layers were reordered, in Llama only.
            let reordered = if architecture == "llama" { 8 } else { 0 };
            assert_eq!(model.names().count() - whole, reordered, "{architecture}");
        }
    }

    #[test]
    fn rows_go_back_to_halves() {
        // One head of six rows; llama.cpp has the pairs (0, 3), (1, 4), (2, 5) side by side.
        assert_eq!([0, 1, 2, 3, 4, 5].map(|row| stored_row(row, 6)), [0, 2, 4, 1, 3, 5]);
        // Heads of two rows stay.
        assert_eq!([0, 1, 2, 3].map(|row| stored_row(row, 2)), [0, 1, 2, 3]);
    }

    #[test]
    fn no_altered_byte_makes_it_panic() {
        let original: &[u8] = include_bytes!("../../../fixtures/golden/gguf_file.gguf");
        let file = Gguf::parse(original).unwrap();
        let header = file.names().map(|name| file.info(name).unwrap().range().start).min().unwrap();
        let (mut bytes, mut models) = (original.to_vec(), 0);
        for at in 0..header {
            bytes[at] = if at % 2 == 0 { 0xff } else { original[at] ^ 1 };
            if let Ok(model) = Gguf::parse(bytes.as_slice()).and_then(Llm::new) {
                models += 1;
                // Only q and k are read in another way than `Gguf::tensor` does.
                let reordered = model.names().filter(|name| name.contains("q_proj") || name.contains("k_proj"));
                reordered.for_each(|name| drop(model.tensor(name).unwrap()));
                drop((model.config(), model.tokenizer(), model.tokenizer_config()));
            }
            bytes[at] = original[at];
        }
        assert!(models > 0, "some alterations, as those of a token, leave a good file");
    }

    #[test]
    fn what_is_no_whole_model_is_refused() {
        let (_, file, _) = MODELS[0];
        let replaced = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let mut bytes = file.to_vec();
            let found: Vec<usize> =
                (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from.as_bytes())).collect();
            for at in found {
                bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            }
            Gguf::parse(bytes).and_then(Llm::new).map(|model| model.names().map(str::to_owned).collect::<Vec<_>>())
        };
        for (from, to, says) in [
            ("llama", "gemma", "general.architecture is `gemma`, known are llama, qwen2, qwen3, smollm3"),
            ("attention.head_count", "attention.head_coumt", "no metadata `llama.attention.head_count`"),
            ("blk.0.attn_v.weight", "blk.0.attn_q.weight", "tensor `blk.0.attn_q.weight` stands there twice"),
            ("general.architecture", "general.architecturr", "no metadata `general.architecture`"),
        ] {
            let error = format!("{:#}", replaced(from, to).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
        // A tensor that is no part of such a model keeps its name.
        let names = replaced("blk.0.ffn_up.weight", "blk.0.ffn_xy.weight").unwrap();
        assert!(names.iter().any(|name| name == "blk.0.ffn_xy.weight"), "{names:?}");
    }
}
