//! SmolLM2-135M-Instruct out of llama.cpp's GGUF: weights in bf16 under their HF names, tokenizer and chat template.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::checkpoint::{Tensors, check_shape, write_json};
use super::gguf::Gguf;

const CONTROL_TOKEN: i32 = 3; // tokenizer.ggml.token_type

/// Reads the GGUF file `gguf` and fills the folder `out`.
pub(crate) fn convert(gguf: &Path, out: &Path) -> Result<()> {
    let bytes = fs::read(gguf).with_context(|| format!("reading {}", gguf.display()))?;
    let file = Gguf::parse(&bytes).with_context(|| format!("reading {}", gguf.display()))?;
    let config = Config::read(&file)?;
    weights(&file, &config)?.write(&out.join("model.safetensors"))?;
    write_json(&out.join("config.json"), &config.json())?;
    write_json(
        &out.join("generation_config.json"),
        &json!({ "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id }),
    )?;
    let chat_template = file.text("tokenizer.chat_template")?;
    fs::write(out.join("chat_template.jinja"), chat_template).context("writing chat_template.jinja")?;
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    ensure!(tokens.len() as u64 == config.vocab_size, "{} tokens for vocab_size {}", tokens.len(), config.vocab_size);
    let specials: Vec<_> = file
        .integers("tokenizer.ggml.token_type")?
        .into_iter()
        .enumerate()
        .filter_map(|(id, kind)| (kind == CONTROL_TOKEN).then_some(id))
        .collect();
    write_json(&out.join("tokenizer.json"), &tokenizer(&file, &tokens, &specials)?)?;
    write_json(&out.join("tokenizer_config.json"), &tokenizer_config(&config, &tokens, &specials, chat_template)?)
}

/// What the GGUF's metadata says about the model.
#[derive(Debug)]
struct Config {
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: u64,
    max_position_embeddings: u64,
    vocab_size: u64,
    rms_norm_eps: f64,
    rope_theta: f64,
    bos_token_id: u64,
    eos_token_id: u64,
    pad_token_id: u64,
}

impl Config {
    fn read(file: &Gguf) -> Result<Self> {
        let architecture = file.text("general.architecture")?;
        ensure!(architecture == "llama", "the GGUF holds a model of architecture `{architecture}`, expected `llama`");
        let config = Self {
            hidden_size: file.unsigned("llama.embedding_length")?,
            intermediate_size: file.unsigned("llama.feed_forward_length")?,
            num_hidden_layers: file.unsigned("llama.block_count")?,
            num_attention_heads: file.unsigned("llama.attention.head_count")?,
            num_key_value_heads: file.unsigned("llama.attention.head_count_kv")?,
            max_position_embeddings: file.unsigned("llama.context_length")?,
            vocab_size: file.unsigned("llama.vocab_size")?,
            rms_norm_eps: file.float("llama.attention.layer_norm_rms_epsilon")?,
            rope_theta: file.float("llama.rope.freq_base")?,
            bos_token_id: file.unsigned("tokenizer.ggml.bos_token_id")?,
            eos_token_id: file.unsigned("tokenizer.ggml.eos_token_id")?,
            pad_token_id: file.unsigned("tokenizer.ggml.padding_token_id")?,
        };
        let (hidden, heads, kv_heads) = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads);
        ensure!(
            heads > 0 && kv_heads > 0 && hidden > 0 && hidden % (2 * heads) == 0 && heads % kv_heads == 0,
            "hidden size {hidden} does not split into {heads} heads and {kv_heads} key-value heads"
        );
        Ok(config)
    }

    /// `config.json`, as the hub's.
    fn json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 1.0 / 24.0, // one over the root of the hidden size
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_interleaved": false,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": true,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

fn weights(file: &Gguf, config: &Config) -> Result<Tensors> {
    let sizes = [config.hidden_size, config.intermediate_size, config.vocab_size];
    let [hidden, intermediate, vocab] = sizes.map(|size| size as usize);
    let heads = config.num_attention_heads as usize;
    let kv_heads = config.num_key_value_heads as usize;
    let kv = hidden / heads * kv_heads;

    let mut tensors = Tensors::default();
    let mut taken = 0;
    let mut take = |gguf_name: &str, name: String, shape: &[usize], heads: Option<usize>| -> Result<()> {
        let (found, mut values) = file.tensor(gguf_name)?;
        check_shape(gguf_name, &found, shape)?;
        if let Some(heads) = heads {
            values = unpermute(&values, heads, hidden / config.num_attention_heads as usize, hidden);
        }
        tensors.push_bf16(name, found, &values);
        taken += 1;
        Ok(())
    };
    take("token_embd.weight", "model.embed_tokens.weight".into(), &[vocab, hidden], None)?;
    take("output_norm.weight", "model.norm.weight".into(), &[hidden], None)?;
    for layer in 0..config.num_hidden_layers {
        let parts: [(&str, &str, &[usize], Option<usize>); 9] = [
            ("attn_norm", "input_layernorm", &[hidden], None),
            ("attn_q", "self_attn.q_proj", &[hidden, hidden], Some(heads)),
            ("attn_k", "self_attn.k_proj", &[kv, hidden], Some(kv_heads)),
            ("attn_v", "self_attn.v_proj", &[kv, hidden], None),
            ("attn_output", "self_attn.o_proj", &[hidden, hidden], None),
            ("ffn_norm", "post_attention_layernorm", &[hidden], None),
            ("ffn_gate", "mlp.gate_proj", &[intermediate, hidden], None),
            ("ffn_up", "mlp.up_proj", &[intermediate, hidden], None),
            ("ffn_down", "mlp.down_proj", &[hidden, intermediate], None),
        ];
        for (gguf_part, part, shape, heads) in parts {
            let gguf_name = format!("blk.{layer}.{gguf_part}.weight");
            take(&gguf_name, format!("model.layers.{layer}.{part}.weight"), shape, heads)?;
        }
    }
    let found = file.names().count();
    ensure!(found == taken, "the GGUF has {found} tensors, the model takes {taken} of them");
    Ok(tensors)
}

/// Puts the rows of q or k back into the order of HF's rotary embedding.
///
/// Within a head llama.cpp has the rotated pairs side by side, row `2 * pair + half`; HF has the halves one after the
/// other, row `half * head_dim / 2 + pair`.
fn unpermute(values: &[f32], heads: usize, head_dim: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = head * head_dim + 2 * pair + half;
                out.extend_from_slice(&values[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

/// `tokenizer.json`: byte-level BPE that splits digits first. GGUF names that splitting only by `pre = smollm`.
fn tokenizer(file: &Gguf, tokens: &[&str], specials: &[usize]) -> Result<Value> {
    let (model, pre) = (file.text("tokenizer.ggml.model")?, file.text("tokenizer.ggml.pre")?);
    ensure!(
        model == "gpt2" && pre == "smollm",
        "the GGUF's tokenizer is `{model}` split by `{pre}`, expected `gpt2` split by `smollm`"
    );
    ensure!(
        !file.bool("tokenizer.ggml.add_bos_token")? && !file.bool("tokenizer.ggml.add_space_prefix")?,
        "the GGUF's tokenizer adds a first token or a space, which SmolLM2's does not"
    );
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| ((*token).into(), id.into())).collect();
    ensure!(vocab.len() == tokens.len(), "the GGUF's vocabulary has a token twice");
    let byte_level = |add_prefix_space| json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true });
    let added_token = |&id: &usize| json!({ "id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": specials.iter().map(added_token).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(false)],
        },
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": file.texts("tokenizer.ggml.merges")?,
        },
    }))
}

fn tokenizer_config(config: &Config, tokens: &[&str], specials: &[usize], chat_template: &str) -> Result<Value> {
    let token = |id: u64| {
        let id = usize::try_from(id)?;
        tokens.get(id).copied().with_context(|| format!("token {id} is not in the vocabulary"))
    };
    let (bos, eos, pad) = (token(config.bos_token_id)?, token(config.eos_token_id)?, token(config.pad_token_id)?);
    let added_token = |&id: &usize| {
        let token = json!({ "content": tokens[id], "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true });
        (id.to_string(), token)
    };
    Ok(json!({
        "add_prefix_space": false,
        "added_tokens_decoder": specials.iter().map(added_token).collect::<Map<_, _>>(),
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": false,
        "eos_token": eos,
        "model_max_length": config.max_position_embeddings,
        "pad_token": pad,
        // The hub has GPT2Tokenizer here; transformers 5 then builds that class's own splitting and drops `Digits`.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token(0)?,
        "vocab_size": config.vocab_size,
    }))
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
    fn rows_go_back_to_halves() {
        // One head of four rows and one column; llama.cpp has pairs (0, 2) and (1, 3) side by side.
        assert_eq!(unpermute(&[0., 2., 1., 3.], 1, 4, 1), [0., 1., 2., 3.]);
        // Two heads of two rows stay, two columns each.
        let rows = [0., 1., 2., 3., 4., 5., 6., 7.];
        assert_eq!(unpermute(&rows, 2, 2, 2), rows);
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
