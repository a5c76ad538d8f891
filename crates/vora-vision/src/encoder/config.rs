//! The config of a vision transformer of any family known here, told apart by its `model_type`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Tensor;
use vora_files::object;
use vora_image::ImageProcessor;
use vora_torch::weights::Weights;

use crate::encoders::{
    Aimv2VisionConfig, ClipVisionConfig, Dinov2Config, Family, Siglip2VisionConfig, SiglipVisionConfig, VitConfig,
};
use crate::transformer::VisionTransformer;

/// One of the families known here.
#[derive(Debug, Clone, PartialEq)]
pub enum EncoderConfig {
    /// `clip_vision_model`, or the vision half of `clip`.
    Clip(ClipVisionConfig),
    /// `siglip_vision_model`, or the vision half of `siglip`; SigLIP 2 at a fixed resolution too.
    Siglip(SiglipVisionConfig),
    /// `siglip2_vision_model`, or the vision half of `siglip2`: SigLIP 2 for pictures of any aspect (NaFlex).
    Siglip2(Siglip2VisionConfig),
    /// `aimv2_vision_model`, or the vision half of `aimv2`, or Apple's own `aimv2`, which has no halves.
    Aimv2(Aimv2VisionConfig),
    /// `vit`
    Vit(VitConfig),
    /// `dinov2` or `dinov2_with_registers`.
    Dinov2(Dinov2Config),
}

impl EncoderConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).with_context(|| {
            format!("cannot read {}; a vision encoder is a folder with config.json in it", path.display())
        })?;
        let json = serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))?;
        Self::from_json(&json).with_context(|| format!("in {}", path.display()))
    }

    /// From the object that a `config.json` holds, or the `vision_config` in that of a larger model.
    ///
    /// # Errors
    /// Where the `model_type` is none of those known here, or a key has a value that no such model can have.
    pub fn from_json(json: &Value) -> Result<Self> {
        let model_type = json["model_type"].as_str().context("`model_type` is missing")?;
        Ok(match model_type {
            "clip_vision_model" => Self::Clip(object(json)?),
            "clip" => Self::Clip(vision_half(json)?),
            "siglip_vision_model" => Self::Siglip(object(json)?),
            "siglip" => Self::Siglip(vision_half(json)?),
            "siglip2_vision_model" => Self::Siglip2(object(json)?),
            "siglip2" => Self::Siglip2(vision_half(json)?),
            "aimv2" if json["vision_config"].is_object() => Self::Aimv2(vision_half(json)?),
            "aimv2" | "aimv2_vision_model" => Self::Aimv2(object(json)?),
            "vit" => Self::Vit(object(json)?),
            "dinov2" | "dinov2_with_registers" => Self::Dinov2(object::<Dinov2Config>(json)?.with_defaults_of(json)),
            other => bail!(
                "model_type `{other}` is not a vision encoder known here; clip, siglip, siglip2, aimv2 (and each with \
                 `_vision_model`), vit, dinov2 and dinov2_with_registers are"
            ),
        })
    }

    /// Builds the transformer from its own names, wherever they stand: at the root of `weights`, or under the name that
    /// models with more in them have for it (`vision_model`, `vit`, `dinov2`).
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish_allowing()`, for which
    /// [`EncoderConfig::leaves_out`] says what no encoder reads.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let (family, names) = (self.family(), self.family().names());
        let below = weights.pp(names.prefix);
        let is_below = below.contains(names.convolution) && !weights.contains(names.convolution);
        let place = if is_below { &below } else { weights };
        let own = |path: &str| path.strip_prefix(place.path()).unwrap_or(path).trim_start_matches('.').to_owned();
        Ok(family.load(place)?.named(|path| format!("{}{}", names.alone, own(path))))
    }

    /// Whether a tensor of such a folder is of no use for hidden states: the words' half of the model, pooling and
    /// classification heads.
    pub fn leaves_out(&self, name: &str) -> bool {
        let names = self.family().names();
        let own = name.strip_prefix(names.prefix).and_then(|name| name.strip_prefix('.')).unwrap_or(name);
        names.left_out.iter().any(|start| own.starts_with(start))
    }

    /// The tensors of the encoder alone among those of such a folder, by the names that Hugging Face's vision model alone
    /// has for them. Heads of its own stay with it; the words' half goes, and the counters of positions that old files
    /// have.
    pub(crate) fn own_tensors(&self, tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
        let names = self.family().names();
        let own = |name: &str| name.strip_prefix(names.prefix)?.strip_prefix('.').map(str::to_owned);
        let has_more = tensors.iter().any(|(name, _)| own(name).is_some());
        let tensors = tensors.into_iter().filter_map(|(name, tensor)| {
            let name = if has_more { own(&name)? } else { name };
            (name != "embeddings.position_ids").then(|| (format!("{}{name}", names.alone), tensor))
        });
        tensors.collect()
    }

    /// What Hugging Face's class calls the module that stands as `name` in the file of its vision model alone: PEFT knows
    /// modules by these names.
    pub fn module_name(&self, name: &str) -> String {
        let modules = self.family().names().modules;
        modules.iter().fold(name.to_owned(), |name, (in_file, in_class)| name.replace(in_file, in_class))
    }

    /// Whether no hidden state of the first `num_layers` blocks depends on this tensor of the encoder alone: later blocks, the
    /// norm after the last, and what no encoder reads.
    pub fn is_beyond(&self, num_layers: usize, name: &str) -> bool {
        let names = self.family().names();
        let own = name.strip_prefix(names.alone).unwrap_or(name);
        let layer = own.split('.').find_map(|part| part.parse::<usize>().ok());
        layer.is_some_and(|layer| layer >= num_layers)
            || names.last_norm.iter().any(|norm| own.starts_with(norm))
            || self.leaves_out(name)
    }

    /// Blocks.
    pub fn num_hidden_layers(&self) -> usize {
        match self {
            Self::Clip(config) => config.num_hidden_layers,
            Self::Siglip(config) => config.num_hidden_layers,
            Self::Siglip2(config) => config.num_hidden_layers,
            Self::Aimv2(config) => config.num_hidden_layers,
            Self::Vit(config) => config.num_hidden_layers,
            Self::Dinov2(config) => config.num_hidden_layers,
        }
    }

    /// Tokens before the patches: the class token and registers.
    pub fn num_prefix_tokens(&self) -> i64 {
        self.family().num_prefix_tokens()
    }

    /// Patches of a picture of the size that it was trained for.
    pub fn num_patches(&self) -> i64 {
        self.family().num_patches()
    }

    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        self.family().patch_size()
    }

    /// How pictures are prepared for the encoder in this folder: as its `preprocessor_config.json` says,
    /// [`EncoderConfig::default_processor`] where there is none.
    ///
    /// # Errors
    /// Names the file and what in it does not fit.
    pub fn processor(&self, folder: &Path) -> Result<ImageProcessor> {
        let prepared = ImageProcessor::is_stored(folder)?;
        if prepared { ImageProcessor::open(folder) } else { Ok(self.default_processor()) }
    }

    /// What its pictures go through where no file says so: mean, std and sampling of the family's own processor, and
    /// the whole picture made a square of the size that it was trained for; for SigLIP 2 one of about its own aspect.
    pub fn default_processor(&self) -> ImageProcessor {
        self.family().default_processor()
    }

    /// The facts of its family.
    fn family(&self) -> &dyn Family {
        match self {
            Self::Clip(config) => config,
            Self::Siglip(config) => config,
            Self::Siglip2(config) => config,
            Self::Aimv2(config) => config,
            Self::Vit(config) => config,
            Self::Dinov2(config) => config,
        }
    }
}

/// The `vision_config` of a model with two halves, or the `vision_config_dict` that old CLIP files have beside it.
fn vision_half<T: DeserializeOwned>(json: &Value) -> Result<T> {
    let half = ["vision_config_dict", "vision_config"].into_iter().find(|key| json[key].is_object());
    match half {
        Some(key) => object(&json[key]).context(key),
        None => object(&Value::Object(Map::new())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use serde_json::json;
    use tch::Kind;

    #[test]
    fn tensors_are_found_with_and_without_the_prefix() {
        for name in ["clip", "siglip", "siglip2", "aimv2", "vit", "dinov2"] {
            let tensors = fixtures::open(name);
            let prefix = EncoderConfig::from_json(&golden::json(name)).unwrap().family().names().prefix;
            let strip = |name: &str| name.strip_prefix(&format!("{prefix}.")).unwrap_or(name).to_owned();
            let below = |name: &str| format!("{prefix}.{}", strip(name));
            let is_text = |name: &str| name.starts_with("text") || name.starts_with("logit");
            for rename in [&strip as &dyn Fn(&str) -> String, &below] {
                let own = tensors.under("weights.").into_iter().filter(|(name, _)| !is_text(name));
                let renamed = own.map(|(name, tensor)| (rename(&name), tensor)).collect();
                let model = golden::load(name, renamed, Kind::Float);
                let states = model.hidden_states(&tensors["native.pixel_values"]);
                fixtures::assert_close_to(&states[3], &tensors["native.hidden_states.3"], 2e-5);
            }
        }
    }

    #[test]
    fn a_vision_half_stands_alone_too() {
        for name in ["clip", "siglip", "siglip2", "aimv2"] {
            let whole = golden::json(name);
            let half = &whole["vision_config"];
            assert_eq!(half["model_type"], format!("{name}_vision_model"));
            assert_eq!(EncoderConfig::from_json(&whole).unwrap(), EncoderConfig::from_json(half).unwrap());
        }
        let old = json!({"model_type": "clip", "vision_config": {"patch_size": 14}, "vision_config_dict": {"patch_size": 16}});
        let expected = EncoderConfig::Clip(ClipVisionConfig { patch_size: 16, ..ClipVisionConfig::default() });
        assert_eq!(EncoderConfig::from_json(&old).unwrap(), expected);
        let registers = EncoderConfig::from_json(&json!({"model_type": "dinov2_with_registers"})).unwrap();
        assert!(matches!(registers, EncoderConfig::Dinov2(config) if config.num_register_tokens == 4));
    }

    #[test]
    fn tensors_of_the_encoder_alone_have_its_own_names() {
        for (name, alone) in [("clip", "vision_model."), ("siglip2", "vision_model."), ("aimv2", ""), ("dinov2", "")] {
            let config = EncoderConfig::from_json(&golden::json(name)).unwrap();
            let own = config.own_tensors(fixtures::open(name).under("weights."));
            assert!(!own.is_empty());
            for (name, _) in &own {
                let name = name.strip_prefix(alone).unwrap();
                assert!(!name.starts_with("text_model") && !name.starts_with("vision_model"), "{name}");
            }
            let again = Weights::from_tensors(own, tch::Device::Cpu, Kind::Float);
            let model = config.load(&again).unwrap();
            again.finish_allowing(|name| config.leaves_out(name)).unwrap();
            assert_eq!(model.num_prefix_tokens(), config.num_prefix_tokens());
        }
        let config = EncoderConfig::from_json(&json!({"model_type": "clip", "vision_config": {}})).unwrap();
        let ids = ("vision_model.embeddings.position_ids".to_owned(), Tensor::from(0i64));
        assert!(config.own_tensors(vec![ids]).is_empty());
        assert_eq!(config.num_patches(), 49);
        let registers = EncoderConfig::from_json(&json!({"model_type": "dinov2_with_registers"})).unwrap();
        assert_eq!(registers.num_prefix_tokens(), 5);
    }

    #[test]
    fn tensors_that_no_encoder_has_are_told() {
        let config = EncoderConfig::from_json(&json!({"model_type": "clip"})).unwrap();
        assert!(config.leaves_out("text_model.encoder.layers.0.mlp.fc1.weight"));
        assert!(config.leaves_out("vision_model.post_layernorm.bias"));
        assert!(!config.leaves_out("vision_model.encoder.layers.12.mlp.fc1.weight"));
        assert!(!config.leaves_out("vision_model.head.probe"));
    }

    #[test]
    fn configs_that_cannot_be_followed_are_refused() {
        let refuse = |json: Value| {
            let weights = Weights::random(0, tch::Device::Cpu, Kind::Float);
            let loaded = EncoderConfig::from_json(&json).and_then(|config| config.load(&weights).map(drop));
            format!("{:#}", loaded.unwrap_err())
        };
        let error = refuse(json!({"model_type": "resnet"}));
        assert!(error.contains("model_type `resnet` is not a vision encoder known here; clip, siglip"), "{error}");
        let error = refuse(json!({"model_type": "siglip2_vision_model", "num_patches": 200}));
        assert!(error.contains("num_patches is 200, which is not a square number"), "{error}");
        assert!(refuse(json!({"hidden_size": 8})).contains("`model_type` is missing"));
        let error = refuse(json!({"model_type": "dinov2", "hidden_size": 10, "num_attention_heads": 3}));
        assert!(error.contains("hidden_size 10 does not divide among num_attention_heads 3"), "{error}");
        let error = refuse(json!({"model_type": "vit", "image_size": [14, 28]}));
        assert!(error.contains("`image_size`: [14, 28] is not a square"), "{error}");
        let error = refuse(json!({"model_type": "siglip", "vision_config": {"patch_size": "x"}}));
        assert!(error.contains("vision_config: `patch_size`: "), "{error}");
        assert!(
            refuse(json!({"model_type": "clip_vision_model", "hidden_act": "relu"})).contains("hidden_act is `relu`")
        );
        assert!(refuse(json!({"model_type": "vit", "num_channels": 1})).contains("num_channels is 1"));
        let native =
            json!({"model_type": "aimv2_vision_model", "is_native": true, "hidden_size": 6, "num_attention_heads": 2});
        assert!(refuse(native).contains("hidden_size 6 is not a multiple of 4"));
    }
}
