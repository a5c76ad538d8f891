//! The JSON files of a checkpoint folder, and a GGUF file's word for those that are not there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;
use vora_torch::gguf;

/// A JSON file of the folder `path`, else what the GGUF file that `path` is or holds says of the same, else the default.
pub(crate) fn read_json<T: DeserializeOwned + Default>(path: &Path, file: &str) -> Result<T> {
    let json = path.join(file);
    if json.exists() {
        let text = fs::read(&json).with_context(|| format!("cannot read {}", json.display()))?;
        return serde_json::from_slice(&text)
            .with_context(|| format!("{} is not JSON as it should be", json.display()));
    }
    let found = match file {
        "config.json" => gguf::config(path)?.map(Value::Object),
        "tokenizer.json" => gguf::tokenizer(path)?.map(|(tokenizer, _)| tokenizer),
        // A folder that brings a tokenizer of its own may hold a GGUF file whose tokenizer is of no known kind.
        "tokenizer_config.json" if !path.join("tokenizer.json").exists() => {
            gguf::tokenizer(path)?.map(|(_, config)| Value::Object(config))
        }
        _ => None,
    };
    found.map_or_else(|| Ok(T::default()), |found| Ok(serde_json::from_value(found)?))
}

/// [`read_json`] of a file that must be there, and where it was read, for errors.
pub(crate) fn open_json(path: &Path, file: &str) -> Result<(Value, PathBuf)> {
    let json: Value = read_json(path, file)?;
    ensure!(!json.is_null(), "cannot read {}: there is no such file, nor a GGUF file", path.join(file).display());
    Ok((json, origin(path, file)))
}

/// Where [`read_json`] reads: the file, or the GGUF file or its folder.
pub(crate) fn origin(path: &Path, file: &str) -> PathBuf {
    let json = path.join(file);
    if json.exists() { json } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tch::{Device, Kind};
    use vora_torch::Weights;

    use crate::{AttentionPlan, CausalLm, ChatTemplate, LlmConfig, Message, Spans, Tokenizer, VisionAttention};

    fn golden(name: &str) -> PathBuf {
        fixtures::root().join("golden").join(name)
    }

    #[test]
    fn a_gguf_file_alone_is_a_decoder() {
        let golden_logits = fixtures::open("gguf_logits");
        for architecture in ["llama", "qwen2", "qwen3"] {
            let path = golden(&format!("gguf_{architecture}.gguf"));
            let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
            let llm = CausalLm::load(&LlmConfig::open(&path).unwrap(), &weights).unwrap();
            weights.finish().unwrap();
            let plan = AttentionPlan::new(&Spans::text(&[24]), VisionAttention::Causal, Device::Cpu, Kind::Float);
            let output = llm.forward(&llm.embed(&golden_logits["input_ids"]), &plan.unwrap(), 0);
            let expected = &golden_logits[&format!("{architecture}.logits")];
            fixtures::assert_close_to(&llm.logits(&output.last_hidden_state), expected, 2e-5);
        }
    }

    #[test]
    fn a_gguf_file_alone_has_a_tokenizer_and_a_chat_template() {
        let path = golden("gguf_file.gguf");
        let tokenizer = Tokenizer::open(&path).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (19, &[2][..]));
        let ids = tokenizer.encode("hello 12").unwrap();
        assert_eq!(ids, [17, 10, 7, 8]); // hello, a space, and each digit by itself, as SmolLM has it
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "hello 12");
        assert_eq!(tokenizer.encode_template("<|im_end|>").unwrap(), [2]);
        let chat = ChatTemplate::open(&path).unwrap();
        assert_eq!(chat.render(&[Message::new("user", "hello")], true).unwrap(), "hello");

        let bare = golden("gguf_qwen3.gguf");
        let error = format!("{:#}", Tokenizer::open(&bare).unwrap_err());
        assert!(error.contains("gguf_qwen3.gguf: there is no metadata `tokenizer.ggml.model`"), "{error}");
        let error = format!("{:#}", LlmConfig::open(&golden("gguf_kinds.gguf")).unwrap_err());
        assert!(error.contains("gguf_kinds.gguf: general.architecture is `test`, known are llama"), "{error}");
        let error = format!("{:#}", LlmConfig::open(&golden("none.gguf")).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("none.gguf"), "{error}");
    }

    #[test]
    fn files_beside_it_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let copy = |from: PathBuf, to: &str| std::fs::copy(from, folder.path().join(to)).unwrap();
        copy(golden("gguf_qwen3.gguf"), "model.gguf"); // it has no tokenizer
        let tiny = fixtures::root().join("tiny/tokenizer");
        copy(tiny.join("tokenizer.json"), "tokenizer.json");
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (512, &[2][..])); // the model's config names the end
        let error = format!("{:#}", ChatTemplate::open(folder.path()).unwrap_err());
        assert!(error.contains("has no chat template"), "{error}");
        copy(tiny.join("chat_template.jinja"), "chat_template.jinja");
        ChatTemplate::open(folder.path()).unwrap();
        assert_eq!(LlmConfig::open(folder.path()).unwrap().model_type, "qwen3");
        let json = serde_json::to_string(&LlmConfig::tiny(8)).unwrap();
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        assert_eq!(LlmConfig::open(folder.path()).unwrap(), LlmConfig::tiny(8));
    }
}
