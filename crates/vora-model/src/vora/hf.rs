//! The files by which HF transformers opens a VoRA's folder with its `Auto` classes and `trust_remote_code`: the code of
//! its three classes, and what they read beside it.
//!
//! The folder keeps the layout and names of the published VoRA models, whose code is of transformers 4.50; this one is
//! our own, checked with 5.23.0 (`fixtures/generate/hf_vora.py`).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tch::Kind;
use vora_files::write_bytes;
use vora_image::ImageProcessor;
use vora_text::{ChatTemplate, Tokenizer};

use crate::beside::{CHAT_TEMPLATE, GENERATION, PREPROCESSOR, PROCESSOR};
use crate::files::{dtype, to_object};

use super::config::{IMAGE_TOKEN_ID, VoraConfig};
use super::vision_embedding_type::VisionEmbeddingType;

/// The code, by the names that the published folders have for it.
const CODE: [(&str, &str); 3] = [
    ("configuration_vora.py", include_str!("hf/configuration_vora.py")),
    ("modeling_vora.py", include_str!("hf/modeling_vora.py")),
    ("processing_vora.py", include_str!("hf/processing_vora.py")),
];

/// The files that a model's folder gets for HF transformers, by name.
#[derive(Debug)]
pub struct HfFiles(pub(crate) Vec<(&'static str, Vec<u8>)>);

impl HfFiles {
    /// The files for a merged VoRA of this `config.json`, whose LLM is stored as `kind`; tokenizer, chat template and image
    /// processor are those of `folder`.
    ///
    /// # Errors
    /// Where the config is no VoRA's or names adapters that are not merged, `folder` lacks a file, or its image processor
    /// is one whose pictures no array of pixels holds.
    pub fn new(folder: &Path, config: &Value, kind: Kind) -> Result<Self> {
        let mut config = to_object(config)?;
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        ensure!(
            model_type == "vora",
            "{} is a `{model_type}`: transformers has its class already, --hf is for a VoRA or a LLaVA",
            folder.display()
        );
        let eyes = config.get("vision_embedding").and_then(Value::as_str).unwrap_or_default();
        ensure!(
            eyes != VisionEmbeddingType::Gemma4Unified.name(),
            "the pictures of {} go through Gemma 4's embedder (vision_embedding: gemma4_unified), for which --hf has no class",
            folder.display()
        );
        let is_apart = config.get("lora").is_some_and(|lora| lora["r"].as_i64().is_some_and(|r| r >= 0));
        ensure!(
            !is_apart,
            "{} has adapters beside its weights, which no class of transformers folds in; merge them with `vora merge`",
            folder.display()
        );
        let rows = config["vocab_size"].as_i64().context("config.json has no `vocab_size`")?;
        let tokenizer = Tokenizer::open(folder)?.for_embedding(rows);
        let (template, image_token) = ChatTemplate::open(folder)?.with_pictures()?;
        let image_token_id = tokenizer.image_token_id(&image_token);
        let processor = ImageProcessor::open(folder)?.to_json();
        let processor_type = processor["image_processor_type"].as_str().unwrap_or_default();
        if processor_type.starts_with("Siglip2") {
            bail!(
                "the image processor of {} makes as many whole patches as fit (SigLIP 2's NaFlex), for which --hf has no \
                 class; give preprocessor_config.json a `size`",
                folder.display()
            );
        }
        let generation = generation(folder, &tokenizer)?;
        // A width that no layer follows here would be followed by classes that ask for nothing else.
        let llm = VoraConfig::from_json(config.clone())?.llm;
        if (0..llm.num_hidden_layers).all(|layer_idx| llm.window(layer_idx).is_none()) {
            config.insert("sliding_window".into(), Value::Null);
        }
        let patch_size = config["patch_size"].clone();
        config.insert(IMAGE_TOKEN_ID.into(), json!(image_token_id));
        config.insert("architectures".into(), json!(["VoRAForCausalLM"]));
        config.insert("auto_map".into(), auto_map());
        config.remove("torch_dtype");
        config.insert("dtype".into(), json!(dtype(kind)));
        let mut in_processor = json!({
            "processor_class": "VoRAProcessor",
            "auto_map": {"AutoProcessor": "processing_vora.VoRAProcessor"},
            "patch_size": patch_size,
            "image_token": image_token,
            "image_token_id": image_token_id,
        });
        if processor_type.ends_with("Pil") {
            in_processor["image_backend"] = json!("pil");
        }
        for key in ["background_color", "min_image_tokens", "max_image_tokens"] {
            if let Some(value) = processor.get(key) {
                in_processor[key] = value.clone();
            }
        }
        let mut files: Vec<_> = CODE.map(|(name, code)| (name, code.as_bytes().to_vec())).into();
        for (name, json) in [
            ("config.json", Value::Object(config)),
            (PREPROCESSOR, processor),
            (PROCESSOR, in_processor),
            (GENERATION, Value::Object(generation)),
        ] {
            files.push((name, serde_json::to_vec_pretty(&json)?));
        }
        files.push((CHAT_TEMPLATE, template.into_bytes()));
        Ok(Self(files))
    }

    /// An error where `folder` has one of the files already that no model's folder has without being asked for it.
    ///
    /// # Errors
    /// Names the file.
    pub fn ensure_vacant(folder: &Path) -> Result<()> {
        let there = CODE.iter().map(|(name, _)| *name).chain([PROCESSOR]).find(|name| folder.join(name).exists());
        ensure!(
            there.is_none(),
            "{} is there already, and --hf would write it; choose another folder",
            folder.join(there.unwrap_or_default()).display()
        );
        Ok(())
    }

    /// Their names and bytes.
    pub(crate) fn into_files(self) -> impl Iterator<Item = (&'static str, Vec<u8>)> {
        self.0.into_iter()
    }

    /// Writes them into `folder`, over what it has of these names.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.0.iter().try_for_each(|(name, bytes)| write_bytes(&folder.join(name), bytes))
    }
}

/// Which class of the code each of the `Auto` classes takes.
fn auto_map() -> Value {
    json!({
        "AutoConfig": "configuration_vora.VoRAConfig",
        "AutoModelForCausalLM": "modeling_vora.VoRAForCausalLM",
        "AutoModelForImageTextToText": "modeling_vora.VoRAForCausalLM",
        "AutoProcessor": "processing_vora.VoRAProcessor",
    })
}

/// What the folder says about generation already, and which tokens end and pad an answer.
pub(crate) fn generation(folder: &Path, tokenizer: &Tokenizer) -> Result<Map<String, Value>> {
    let path = folder.join(GENERATION);
    let mut generation: Map<String, Value> = if path.exists() {
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not a JSON object", path.display()))?
    } else {
        Map::new()
    };
    let eos_ids = tokenizer.eos_ids();
    ensure!(!eos_ids.is_empty(), "{} names no token that ends an answer (eos_token_id)", folder.display());
    generation.insert("eos_token_id".into(), json!(eos_ids));
    generation.entry("pad_token_id").or_insert_with(|| json!(eos_ids[0]));
    Ok(generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Tensor};
    use vora_files::checksums;
    use vora_text::Piece;
    use vora_torch::weights::Weights;

    use crate::model::{Input, VisionLanguageModel};
    use crate::vora::Vora;

    /// The pictures of each row of the golden batch.
    const PICTURES: [&[usize]; 3] = [&[0], &[1, 2], &[]];

    fn golden_json() -> Value {
        serde_json::from_slice(&std::fs::read(fixtures::root().join("golden/hf_vora.json")).unwrap()).unwrap()
    }

    #[test]
    fn the_golden_file_is_of_this_code() {
        let code = format!("{}{}", CODE[0].1, CODE[1].1);
        assert_eq!(
            golden_json()["code"],
            checksums::of(code.as_bytes()),
            "`cargo xtask fixtures hf_vora` makes it again"
        );
    }

    /// Words and pictures, of which `ids` have each as many tokens as it has patches.
    fn input(model: &Vora, ids: &[i64], pictures: &[Tensor], image_token_id: i64) -> Input {
        let mut pieces = Vec::new();
        let (mut rest, mut waiting) = (ids, pictures.iter());
        while let Some((&id, after)) = rest.split_first() {
            rest = after;
            if id == image_token_id {
                let (_, height, width) = waiting.next().unwrap().size3().unwrap();
                let (rows, columns) = model.image_grid(height, width).unwrap();
                rest = &rest[(rows * columns - 1) as usize..];
                pieces.push(Piece::Image);
            } else {
                pieces.push(Piece::Text { ids: vec![id], supervised: false });
            }
        }
        Input::prompt(&pieces, pictures.iter().map(Tensor::shallow_clone).collect(), model).unwrap()
    }

    #[test]
    fn transformers_says_what_we_say() {
        let (golden, json) = (fixtures::open("hf_vora"), golden_json());
        for (name, config) in json["configs"].as_object().unwrap() {
            let image_token_id = config[IMAGE_TOKEN_ID].as_i64().unwrap();
            let weights = Weights::from_tensors(golden.under(&format!("{name}.weights.")), Device::Cpu, Kind::Float);
            let model = Vora::load(VoraConfig::from_json(to_object(config).unwrap()).unwrap(), &weights).unwrap();
            weights.finish().unwrap();
            for (row, pictures) in PICTURES.into_iter().enumerate() {
                let of_row = |what: &str| &golden[&format!("{name}.row_{row}.{what}")];
                let pictures: Vec<_> =
                    pictures.iter().map(|k| golden[&format!("picture_{k}")].shallow_clone()).collect();
                let ids = |what: &str| Vec::<i64>::try_from(of_row(what)).unwrap();
                let (prompt, generated) = (ids("input_ids"), ids("generated"));
                let all = input(&model, &[prompt.clone(), generated.clone()].concat(), &pictures, image_token_id);
                let hidden = tch::no_grad(|| model.forward(&all, 0)).unwrap().last_hidden_state.squeeze_dim(0);
                let logits = model.llm().logits(&hidden).detach(); // [seq, vocab]
                let len = prompt.len() as i64;
                fixtures::assert_close(&logits.narrow(0, 0, len), of_row("logits"));
                let likeliest = logits.narrow(0, len - 1, generated.len() as i64).argmax(-1, false);
                assert_eq!(Vec::<i64>::try_from(likeliest).unwrap(), generated, "{name}, row {row}");
            }
        }
    }

    #[test]
    fn what_is_no_merged_vora_is_refused() {
        let mut config = golden_json()["configs"]["llama"].clone();
        let tiny = fixtures::root().join("tiny/llm");
        let refused = |config: &Value| format!("{:#}", HfFiles::new(&tiny, config, Kind::Float).unwrap_err());
        assert!(refused(&config).contains("no preprocessor_config.json in"), "all else is there");
        config["lora"] = json!({"layers": 1, "r": 4, "target_modules": ["q_proj"]});
        assert!(refused(&config).contains("has adapters beside its weights"));
        config["vision_embedding"] = "gemma4_unified".into();
        assert!(refused(&config).contains("go through Gemma 4's embedder"));
        config["model_type"] = "llava".into();
        assert!(
            refused(&config)
                .contains("is a `llava`: transformers has its class already, --hf is for a VoRA or a LLaVA")
        );
    }

    #[test]
    fn a_config_with_a_picture_token_is_read_without_it() {
        let json = to_object(&golden_json()["configs"]["windows"]).unwrap();
        let config = VoraConfig::from_json(json).unwrap();
        assert_eq!((config.llm.sliding_window, config.llm.extra.get(IMAGE_TOKEN_ID)), (Some(5), None));
    }
}
