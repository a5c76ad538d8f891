//! Which class `AutoTokenizer` of HF transformers 5 takes for a folder, and the special tokens that this class names where
//! the folder's files name none.
//!
//! Its classes also build normalizer, splitting and decoder anew from the vocabulary; here `tokenizer.json` is read as it
//! stands, whichever class a folder names: it is what models were trained with, it travels with them, and a class does
//! not, as it depends on the type of the model in the same folder. Where that means something else, it is said once
//! ([`ClassParts`](crate::class_parts::ClassParts)).

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use vora_gguf::folder::read_json;

/// A class with special tokens of its own, among those of the decoders here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum TokenizerClass {
    /// `TokenizersBackend`, known as `PreTrainedTokenizerFast` before, and whatever is not known here.
    #[default]
    Plain,
    Llama,
    Gpt2,
    Qwen2,
}

impl TokenizerClass {
    /// The class for the folder `path`; `named` is what its `tokenizer_config.json` has as `tokenizer_class`.
    ///
    /// Errors name the file that cannot be read.
    pub(crate) fn of(path: &Path, named: Option<&str>) -> Result<Self> {
        let tokenizer = path.join("tokenizer.json");
        if !tokenizer.exists() {
            return Ok(Self::Plain); // a GGUF file's tokenizer has no class
        }
        let has_config = path.join("config.json").exists(); // and not a GGUF file's
        let config: Value = if has_config { read_json(path, "config.json")? } else { Value::Null };
        let key = |key: &str| config[key].as_str();
        // A VoRA written here says what its LLM is.
        let model = key("llm_model_type").or_else(|| key("model_type")).unwrap_or_default();
        let declared = named.or_else(|| key("tokenizer_class"));
        let is_byte_level = || -> Result<bool> {
            let text = std::fs::read_to_string(&tokenizer);
            Ok(text.with_context(|| format!("cannot read {}", tokenizer.display()))?.contains("\"ByteLevel\""))
        };
        Ok(match (model, declared) {
            // Types whose class the library takes whatever a folder says, or takes none of a folder's.
            ("qwen2", _) | ("qwen3", None) => Self::Qwen2,
            ("llava" | "mistral", _) => Self::Plain,
            (_, Some(name)) => match Self::by_name(name) {
                Self::Llama if is_byte_level()? => Self::Plain,
                class => class,
            },
            (_, None) => Self::Plain,
        })
    }

    fn by_name(name: &str) -> Self {
        match name.strip_suffix("Fast").unwrap_or(name) {
            "LlamaTokenizer" => Self::Llama,
            "GPT2Tokenizer" => Self::Gpt2,
            "Qwen2Tokenizer" => Self::Qwen2,
            _ => Self::Plain,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "TokenizersBackend",
            Self::Llama => "LlamaTokenizer",
            Self::Gpt2 => "GPT2Tokenizer",
            Self::Qwen2 => "Qwen2Tokenizer",
        }
    }

    /// The special tokens of the class, by the keys that `tokenizer_config.json` would name them under.
    pub(crate) fn special_tokens(self) -> &'static [(&'static str, &'static str)] {
        const END: &str = "<|endoftext|>";
        match self {
            Self::Plain => &[],
            Self::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Self::Gpt2 => &[("bos_token", END), ("eos_token", END), ("unk_token", END)],
            Self::Qwen2 => &[("eos_token", END), ("unk_token", END), ("pad_token", END)],
        }
    }
}
