//! SmolLM2-135M-Instruct out of llama.cpp's GGUF: weights in bf16 under their HF names, tokenizer and chat template.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use vora_gguf::{Gguf, Llm};

use super::checkpoint::{Tensors, check_shape, write_json};

/// Reads the GGUF file `gguf` and fills the folder `out`.
pub(crate) fn convert(gguf: &Path, out: &Path) -> Result<()> {
    let bytes = fs::read(gguf).with_context(|| format!("reading {}", gguf.display()))?;
    let file = Gguf::parse(bytes).and_then(Llm::new).with_context(|| format!("reading {}", gguf.display()))?;
    let config = config(&file)?;
    weights(&file, &config)?.write(&out.join("model.safetensors"))?;
    let ids = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let generation: Map<String, Value> = ids.iter().map(|id| ((*id).into(), config[*id].clone())).collect();
    write_json(&out.join("generation_config.json"), &generation.into())?;
    let tokenizer_config = tokenizer_config(&file, &config)?;
    write_json(&out.join("config.json"), &config.into())?;
    let chat_template = file.file().text("tokenizer.chat_template")?;
    fs::write(out.join("chat_template.jinja"), chat_template).context("writing chat_template.jinja")?;
    write_json(&out.join("tokenizer.json"), &file.tokenizer()?)?;
    write_json(&out.join("tokenizer_config.json"), &tokenizer_config.into())
}

/// `config.json`, as the hub's: what the GGUF says, and what it leaves out.
fn config<B: AsRef<[u8]>>(file: &Llm<B>) -> Result<Map<String, Value>> {
    let mut config = file.config()?;
    let model_type = config["model_type"].as_str().unwrap_or_default();
    ensure!(model_type == "llama", "the GGUF holds a model of architecture `{model_type}`, expected `llama`");
    for id in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        ensure!(config.contains_key(id), "the GGUF has no {id}");
    }
    let more = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.0,
        "initializer_range": 1.0 / 24.0, // one over the root of the hidden size
        "rope_interleaved": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
    });
    config.extend(more.as_object().cloned().unwrap_or_default());
    config.remove("head_dim"); // is the hidden size over the heads
    Ok(config)
}

/// Every tensor in bf16, in the order of the layers; shapes are checked against `config`.
fn weights<B: AsRef<[u8]> + Sync>(file: &Llm<B>, config: &Map<String, Value>) -> Result<Tensors> {
    let size = |key: &str| config[key].as_u64().map(|size| size as usize).with_context(|| format!("no {key}"));
    let (hidden, intermediate, vocab) = (size("hidden_size")?, size("intermediate_size")?, size("vocab_size")?);
    let kv = hidden / size("num_attention_heads")? * size("num_key_value_heads")?;

    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..size("num_hidden_layers")? {
        let parts: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[hidden]),
            ("self_attn.q_proj", &[hidden, hidden]),
            ("self_attn.k_proj", &[kv, hidden]),
            ("self_attn.v_proj", &[kv, hidden]),
            ("self_attn.o_proj", &[hidden, hidden]),
            ("post_attention_layernorm", &[hidden]),
            ("mlp.gate_proj", &[intermediate, hidden]),
            ("mlp.up_proj", &[intermediate, hidden]),
            ("mlp.down_proj", &[hidden, intermediate]),
        ];
        shapes.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape.to_vec())));
    }
    let found = file.names().count();
    ensure!(found == shapes.len(), "the GGUF has {found} tensors, the model takes {} of them", shapes.len());
    let mut tensors = Tensors::default();
    for (name, shape) in shapes {
        let info = file.info(&name).with_context(|| format!("the GGUF has no tensor for `{name}`"))?;
        check_shape(&name, info.shape(), &shape)?;
        tensors.push_bf16(name.clone(), shape, &file.tensor(&name)?);
    }
    Ok(tensors)
}

/// `tokenizer_config.json`, as the hub's: what the GGUF says, and what it leaves out.
fn tokenizer_config<B: AsRef<[u8]>>(file: &Llm<B>, config: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut keys = file.tokenizer_config()?;
    let unknown = file.file().texts("tokenizer.ggml.tokens")?.first().copied().context("the vocabulary is empty")?;
    let more = json!({
        "add_prefix_space": false,
        "additional_special_tokens": [keys["bos_token"], keys["eos_token"]],
        "model_max_length": config["max_position_embeddings"],
        "unk_token": unknown,
        "vocab_size": config["vocab_size"],
    });
    keys.extend(more.as_object().cloned().unwrap_or_default());
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const GOLDEN: &[u8] = include_bytes!("../../../fixtures/golden/gguf_file.safetensors");

    fn converted() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden/gguf_file.gguf");
        convert(&gguf, folder.path()).unwrap();
        folder
    }

    fn json_file(folder: &tempfile::TempDir, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(folder.path().join(name)).unwrap()).unwrap()
    }

    #[test]
    fn weights_match_the_reference() {
        let folder = converted();
        let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
        let (found, golden) = (SafeTensors::deserialize(&bytes).unwrap(), SafeTensors::deserialize(GOLDEN).unwrap());
        assert_eq!(found.len(), 11);
        for (name, tensor) in found.tensors() {
            let expected = golden.tensor(&format!("hf.{name}")).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (expected.dtype(), expected.shape()), "{name}");
            assert_eq!(tensor.data(), expected.data(), "{name}");
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn config_and_tokenizer_are_those_of_the_hub() {
        let folder = converted();
        let config = json_file(&folder, "config.json");
        assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&json!(1e-5), &json!(100000.0)));
        assert_eq!((&config["hidden_size"], &config["vocab_size"]), (&json!(32), &json!(19)));
        let tokenizer = json_file(&folder, "tokenizer.json");
        assert_eq!(
            tokenizer["pre_tokenizer"]["pretokenizers"][0],
            json!({ "type": "Digits", "individual_digits": true })
        );
        assert_eq!(tokenizer["model"]["vocab"]["<|im_end|>"], 2);
        assert_eq!(tokenizer["model"]["merges"][3], "hell o");
        assert_eq!(tokenizer["added_tokens"].as_array().unwrap().len(), 3);
        let tokenizer_config = json_file(&folder, "tokenizer_config.json");
        assert_eq!(
            (&tokenizer_config["bos_token"], &tokenizer_config["eos_token"]),
            (&json!("<|im_start|>"), &json!("<|im_end|>"))
        );
        let template = fs::read_to_string(folder.path().join("chat_template.jinja")).unwrap();
        assert_eq!(tokenizer_config["chat_template"], template);
    }

    #[test]
    fn another_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join("no.gguf");
        fs::write(&gguf, b"<html>").unwrap();
        let error = format!("{:#}", convert(&gguf, folder.path()).unwrap_err());
        assert!(error.contains("no.gguf: this is not a GGUF file"), "{error}");
    }
}
