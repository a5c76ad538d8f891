//! The eyes of a model as the file that llama.cpp takes beside its language model's: those of a LLaVA, and a VoRA's that are
//! Gemma 4's.

use anyhow::{Result, bail, ensure};
use tch::Tensor;
use vora_files::tell_once;
use vora_gguf::write::{FileKind, Gemma4EyesMetadata, MmprojMetadata, ModelWriter, gemma4_eyes, mmproj};
use vora_image::ImageProcessor;
use vora_vision::{EncoderConfig, Gemma4VisionConfig, VisionFeatureSelectStrategy};

use super::gguf;
use super::report::Change;
use super::source::Source;
use super::step::Step;
use crate::llava::{LlavaConfig, MmProjectorType};
use crate::vora::{VisionEmbeddingType, VoraConfig};

/// The only file in the folder that is written.
pub(super) const FILE: &str = "mmproj.gguf";

/// The file of the eyes, whose tensors the steps make; those that nothing which the language model sees depends on are dropped.
pub(super) fn plan(source: &Source, steps: &mut [Step], kind: FileKind) -> Result<ModelWriter> {
    match &source.vora {
        Some(vora) => of_vora(source, vora, steps, kind),
        None => of_llava(source, steps, kind),
    }
}

fn of_vora(source: &Source, vora: &VoraConfig, steps: &[Step], kind: FileKind) -> Result<ModelWriter> {
    ensure!(
        vora.vision_embedding == VisionEmbeddingType::Gemma4Unified,
        "vision_embedding is {}, for which llama.cpp has no word in an mmproj file: it has {}",
        vora.vision_embedding.name(),
        VisionEmbeddingType::Gemma4Unified.name()
    );
    let processor = ImageProcessor::open(&source.path)?;
    let (image_mean, image_std) = processor.mean_std();
    tell_once(format!(
        "llama.cpp writes <|image> and <image|> around a picture: the chat template that {} was trained with has to write them, \
         too; and it makes 70 to 280 tokens of it, unless --image-min-tokens and --image-max-tokens say otherwise",
        source.path.display()
    ));
    let metadata = Gemma4EyesMetadata {
        name: gguf::name(&source.path),
        image_size: u32::try_from(vora.image_size)?,
        patch_size: u32::try_from(vora.patch_size)?,
        mm_embed_dim: u32::try_from(vora.vision_embedding_intermediate_size)?,
        rms_norm_eps: Gemma4VisionConfig::default().rms_norm_eps,
        projection_dim: u32::try_from(vora.llm.hidden_size)?,
        image_mean,
        image_std,
    };
    let mut tensors = gguf::infos(steps);
    for (name, shape) in &mut tensors {
        if name.ends_with(POSITIONS) {
            shape.swap(0, 1);
        }
    }
    gemma4_eyes(&metadata, kind, &tensors)
}

/// Positions `[positions, 2, embed]`: columns, then rows.
const POSITIONS: &str = "vision_embedder.pos_embedding";
/// What has a number for each of a patch's pixels, by row, column and channel.
const OF_PIXELS: [&str; 3] =
    ["vision_embedder.patch_ln1.weight", "vision_embedder.patch_ln1.bias", "vision_embedder.patch_dense.weight"];

/// A tensor as it lies in the file: of Gemma 4's eyes pixels by channel, row and column, and all columns before all rows.
pub(super) fn arranged(name: &str, tensor: &Tensor) -> Result<Tensor> {
    if name.ends_with(POSITIONS) {
        return Ok(tensor.f_transpose(0, 1)?);
    }
    if !OF_PIXELS.iter().any(|of_pixels| name.ends_with(of_pixels)) {
        return Ok(tensor.shallow_clone());
    }
    let size = tensor.size();
    let pixels = size.last().copied().unwrap_or(0) / 3;
    let side = (pixels as f64).sqrt() as i64;
    Ok(tensor.f_view([-1, side, side, 3])?.f_permute([0, 3, 1, 2])?.f_reshape(&size)?)
}

/// That of a LLaVA's encoder and projection.
fn of_llava(source: &Source, steps: &mut [Step], kind: FileKind) -> Result<ModelWriter> {
    let config = LlavaConfig::open(&source.path)?;
    let encoder = config.encoder()?;
    let mut metadata = metadata(&config, &encoder)?;
    metadata.name = gguf::name(&source.path);
    (metadata.image_mean, metadata.image_std) = ImageProcessor::open(&source.path)?.mean_std();
    if encoder.num_prefix_tokens() > 0 {
        tell_once(format!(
            "llama.cpp puts the class token of a CLIP behind the patches (its issue 25814, still so in xllamacpp 2026.10.11549): until it \
             is mended it sees less in pictures by {FILE} than {} does; a SigLIP has none",
            source.path.display()
        ));
    }
    let num_layers = metadata.num_hidden_layers as usize;
    for step in steps.iter_mut() {
        let name = step.to.as_deref().and_then(|name| name.strip_prefix("vision_tower."));
        if name.is_some_and(|name| encoder.is_beyond(num_layers, name) || name.ends_with("embeddings.position_ids")) {
            (step.to, step.change, step.why) = (None, Change::Dropped, Some("what is projected does not depend on it"));
        }
    }
    mmproj(&metadata, kind, &gguf::infos(steps))
}

/// The config in llama.cpp's words, but for the pictures.
///
/// # Errors
/// Names the key that it has no word for.
fn metadata(config: &LlavaConfig, encoder: &EncoderConfig) -> Result<MmprojMetadata> {
    let no_word = |key: &str, value: &str, has: &str| {
        format!("{key} is {value}, for which llama.cpp has no word in an mmproj file: it has {has}")
    };
    ensure!(
        config.mm_projector_type == MmProjectorType::Mlp2xGelu && config.multimodal_projector_bias,
        no_word("mm_projector_type", "linear, or without biases", "mlp2x_gelu with biases")
    );
    let strategy = config.features.vision_feature_select_strategy;
    let (fitting, word) = match encoder.num_prefix_tokens() {
        0 => (VisionFeatureSelectStrategy::Full, "full, of an encoder without a class token"),
        _ => (VisionFeatureSelectStrategy::Default, "default, of an encoder with a class token"),
    };
    ensure!(strategy == fitting, no_word("vision_feature_select_strategy", &format!("{strategy:?}"), word));
    let indices = config.features.hidden_state_indices(encoder.num_hidden_layers())?;
    let [num_layers] = indices[..] else {
        bail!(no_word("vision_feature_layer", &format!("{indices:?}"), "one layer"));
    };
    macro_rules! of {
        ($encoder:ident) => {
            MmprojMetadata {
                name: String::new(),
                image_size: u32::try_from($encoder.image_size)?,
                patch_size: u32::try_from($encoder.patch_size)?,
                hidden_size: u32::try_from($encoder.hidden_size)?,
                intermediate_size: u32::try_from($encoder.intermediate_size)?,
                num_hidden_layers: u32::try_from(num_layers)?,
                num_attention_heads: u32::try_from($encoder.num_attention_heads)?,
                layer_norm_eps: $encoder.layer_norm_eps,
                hidden_act: $encoder.hidden_act.clone(),
                projection_dim: u32::try_from(config.llm.hidden_size)?,
                image_mean: [0.0; 3],
                image_std: [1.0; 3],
            }
        };
    }
    Ok(match encoder {
        EncoderConfig::Clip(encoder) => of!(encoder),
        EncoderConfig::Siglip(encoder) => of!(encoder),
        _ => bail!(no_word("the vision tower", "neither a CLIP nor a SigLIP", "these two")),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};
    use tch::Kind;
    use vora_gguf::Gguf;
    use vora_llm::LlmConfig;

    use super::*;
    use crate::convert::{Conversion, Layout, Options};
    use crate::files::save_folder;
    use crate::vora::Vora;

    fn said(tower: Value, keys: Value) -> Result<MmprojMetadata, String> {
        let mut json = json!({
            "model_type": "llava", "vision_config": tower, "text_config": LlmConfig::tiny(64), "image_token_index": 63,
        });
        json.as_object_mut().unwrap().extend(keys.as_object().cloned().unwrap());
        let config = LlavaConfig::from_json(json.as_object().cloned().unwrap()).unwrap();
        metadata(&config, &config.encoder().unwrap()).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_config_is_said_in_llama_cpps_words_or_refused() {
        let clip =
            json!({"model_type": "clip_vision_model", "num_hidden_layers": 4, "image_size": 28, "patch_size": 14});
        let siglip = json!({"model_type": "siglip_vision_model", "num_hidden_layers": 4});
        let found = said(clip.clone(), json!({})).unwrap();
        assert_eq!((found.num_hidden_layers, found.image_size, &*found.hidden_act), (3, 28, "quick_gelu"));
        let full = json!({"vision_feature_select_strategy": "full", "vision_feature_layer": -1});
        let found = said(siglip, full.clone()).unwrap();
        assert_eq!((found.num_hidden_layers, &*found.hidden_act), (4, "gelu_pytorch_tanh"));
        for (tower, keys, expected) in [
            (clip.clone(), full, "vision_feature_select_strategy is Full"),
            (clip.clone(), json!({"vision_feature_layer": [-2, -1]}), "vision_feature_layer is [3, 4]"),
            (clip.clone(), json!({"mm_projector_type": "linear"}), "mm_projector_type is linear"),
            (json!({"model_type": "dinov2"}), json!({}), "the vision tower is neither a CLIP nor a SigLIP"),
        ] {
            let error = said(tower, keys).unwrap_err();
            assert!(error.starts_with(expected) && error.contains("no word in an mmproj file"), "{error}");
        }
    }

    #[test]
    fn the_eyes_of_either_layout_are_one_file() {
        let configs = fs::read(fixtures::root().join("golden/llava.json")).unwrap();
        let configs: Value = serde_json::from_slice(&configs).unwrap();
        for tower in ["clip", "siglip"] {
            let root = tempfile::tempdir().unwrap();
            let [published, modules, eyes, same] =
                ["published", "modules", "eyes", "same"].map(|name| root.path().join(name));
            let tensors = fixtures::open("llava").under(&format!("{tower}.weights."));
            save_folder(&published, &configs[tower], &tensors).unwrap();
            let side = configs[tower]["vision_config"]["image_size"].as_u64().unwrap();
            let processor =
                ImageProcessor::square(side as u32, [0.25, 0.5, 0.75], [0.5; 3], vora_image::Resample::Bicubic);
            fs::write(published.join("preprocessor_config.json"), processor.to_json().to_string()).unwrap();
            let convert = |from: &_, out: &_, to| {
                let options = Options::default().with_layout(Some(to));
                let conversion = Conversion::plan(from, &options, &|_| bail!("it has no base")).unwrap();
                conversion.write(out).unwrap();
                conversion.report()
            };
            convert(&published, &modules, Layout::LlavaTransformers5);
            let report = convert(&published, &eyes, Layout::Mmproj);
            convert(&modules, &same, Layout::Mmproj);
            let [file, same] = [eyes, same].map(|folder| Gguf::parse(fs::read(folder.join(FILE)).unwrap()).unwrap());
            assert!(file.names().eq(same.names()));
            let written: Vec<_> = report.tensors.iter().filter(|tensor| tensor.to.is_some()).collect();
            assert_eq!(written.len(), file.names().count());
            for tensor in &written {
                let (_, stored) = tensors.iter().find(|(name, _)| *name == tensor.from[0]).unwrap();
                let name = tensor.to.as_ref().unwrap();
                let found = Tensor::from_slice(&file.tensor(name).unwrap());
                assert!(same.tensor(name).unwrap() == file.tensor(name).unwrap(), "{tower} {name}");
                assert!(found.equal(&stored.to_kind(Kind::Float).view([-1])), "{tower} {}", tensor.from[0]);
            }
            let dropped =
                |start: &str| report.tensors.iter().filter(|t| t.to.is_none() && t.from[0].contains(start)).count();
            // Of the CLIP the second-last hidden state is projected, of the SigLIP the last.
            assert_eq!(dropped("encoder.layers.1."), if tower == "clip" { 16 } else { 0 });
            assert_eq!(dropped("post_layernorm"), 2);
            assert!(dropped("encoder.layers.0.") == 0 && dropped("multi_modal_projector") == 0, "{tower}");
            assert!(file.has("clip.use_gelu") == (tower == "siglip"));
        }
    }

    /// Pixels of a patch go by channel first, and the columns' positions stand before the rows'.
    #[test]
    fn a_voras_eyes_are_written_where_they_are_gemmas() {
        let mut config = VoraConfig::new(LlmConfig::tiny(64), 6, 2, 8);
        let convert = |config: &VoraConfig, folder: &std::path::Path| {
            let weights = vora_torch::weights::Weights::random(3, tch::Device::Cpu, Kind::Float);
            let model = Vora::load(config.clone(), &weights).unwrap();
            let tensors = crate::VisionLanguageModel::tensors(&model).unwrap();
            let source = folder.join("source");
            save_folder(&source, &config.to_json().unwrap(), &tensors).unwrap();
            let processor = ImageProcessor::square(8, [0.0; 3], [1.0; 3], vora_image::Resample::Bicubic);
            fs::write(source.join("preprocessor_config.json"), processor.to_json().to_string()).unwrap();
            let options = Options::default().with_layout(Some(Layout::Mmproj));
            let conversion = Conversion::plan(&source, &options, &|_| bail!("it has no base"))?;
            conversion.write(&folder.join("eyes"))?;
            let file = Gguf::parse(fs::read(folder.join("eyes").join(FILE)).unwrap()).unwrap();
            anyhow::Ok((file, tensors))
        };
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", convert(&config, folder.path()).unwrap_err());
        assert!(error.contains("vision_embedding is AIMv2Embedding, for which llama.cpp has no word"), "{error}");

        config.vision_embedding = VisionEmbeddingType::Gemma4Unified;
        let folder = tempfile::tempdir().unwrap();
        let (file, tensors) = convert(&config, folder.path()).unwrap();
        assert_eq!((file.names().count(), file.text("clip.projector_type").unwrap()), (10, "gemma4uv"));
        assert_eq!(file.info("v.position_embd.weight").unwrap().shape(), [2, 1120, 6]);
        let written = |name: &str| file.tensor(name).unwrap();
        let stored = |end: &str| {
            let (_, tensor) = tensors.iter().find(|(name, _)| name.ends_with(end)).unwrap();
            Vec::<f32>::try_from(tensor.detach().contiguous().view([-1])).unwrap()
        };
        let (weight, dense) = (written("v.patch_embd.weight"), stored("patch_dense.weight"));
        for (row, y, x, channel) in [(0, 0, 1, 0), (3, 1, 0, 2), (5, 1, 1, 1)] {
            let (there, here) = ((channel * 2 + y) * 2 + x, (y * 2 + x) * 3 + channel);
            assert_eq!(weight[row * 12 + there], dense[row * 12 + here]);
        }
        let (table, positions) = (written("v.position_embd.weight"), stored("pos_embedding"));
        for (axis, at) in [(0, 7), (1, 3)] {
            assert_eq!(table[(axis * 1120 + at) * 6..][..6], positions[(at * 2 + axis) * 6..][..6]);
        }
        assert_eq!(written("mm.input_projection.weight"), stored("embedding_projection.weight"));
    }
}
