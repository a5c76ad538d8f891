//! `preprocessor_config.json`: what it asks for, read and written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use vora_files::{object, tell_once};

use crate::budget::TokenBudget;
use crate::processor::{IMAGENET_STANDARD, ImageProcessor, OPENAI_CLIP, Size, soft_token_budget};
use crate::resample::{Backend, Resample};

impl ImageProcessor {
    /// Reads the `image_processor` inside `processor_config.json` of a model folder, or, where there is none,
    /// `preprocessor_config.json`. Where it does not name its class, that of the `model_type` in `config.json` is taken.
    ///
    /// # Errors
    /// Names the file, and the key that this crate cannot follow.
    pub fn open(folder: &Path) -> Result<Self> {
        let missing = || {
            let folder = folder.display();
            format!("no preprocessor_config.json in {folder}, and no processor_config.json with an `image_processor`")
        };
        let (path, json) = stored(folder)?.with_context(missing)?;
        let processor = Self::read(json, class_of_model(folder)).with_context(|| format!("in {}", path.display()))?;
        // What the published VoRA code does before its processor is given a picture, in training and in its own `processing_vora`.
        let pads = processor.pad.is_none() && is_published_vora(folder);
        Ok(if pads { processor.with_pad(Some([0; 3])) } else { processor })
    }

    /// Whether a folder says how its pictures are prepared.
    ///
    /// # Errors
    /// Where a file that may say it cannot be read.
    pub fn is_stored(folder: &Path) -> Result<bool> {
        Ok(stored(folder)?.is_some())
    }

    /// From the object that such a file holds. Keys that it lacks are as its `image_processor_type` has them;
    /// `BitImageProcessor` where it lacks that too.
    ///
    /// # Errors
    /// Where the type is not known here, or a key asks for what this crate does not do.
    pub fn from_json(json: Value) -> Result<Self> {
        Self::read(json, "Bit")
    }

    fn read(mut json: Value, class: &str) -> Result<Self> {
        if let Some(nested) = json.get_mut("image_processor") {
            json = nested.take();
        }
        let keys: Keys = object(&json)?;
        let name = keys.image_processor_type.as_deref().or(keys.feature_extractor_type.as_deref());
        let (class, named_backend) = name.map_or((class, None), class_and_backend);
        let class = Class::named(class)?;
        ensure!(!keys.use_square_size.unwrap_or(false), "use_square_size is true, give size a height and a width");
        let data_format = keys.data_format.as_deref().unwrap_or("channels_first");
        ensure!(data_format == "channels_first", "data_format is `{data_format}`, only `channels_first` is supported");
        let backend = match (keys.backend.as_deref(), keys.use_fast) {
            (Some("pil"), _) | (None, Some(false)) => Backend::Pillow,
            (Some("torchvision"), _) | (None, Some(true)) => Backend::Torchvision,
            (Some(other), _) => bail!("backend is `{other}`, known are `torchvision` and `pil`"),
            (None, None) => named_backend.unwrap_or_default(),
        };

        // Of a step that is left out, no key is asked.
        let (mut size, mut resample) = (None, class.resample);
        if keys.do_resize.unwrap_or(true) {
            size = Some(keys.size(&class)?);
            resample = keys.resample.map_or(Ok(resample), Resample::from_pillow)?;
        }
        let do_center_crop = keys.do_center_crop.unwrap_or(class.do_center_crop);
        let keeps_shape = matches!(size, Some(Size::Budget(_)));
        ensure!(
            !keeps_shape || !(do_center_crop || class.pads_to_square),
            "max_image_tokens keeps a picture's shape, set do_center_crop to false and let no bars make it a square"
        );
        let crop_size = do_center_crop.then(|| keys.crop_size(&class)).transpose()?;
        let rescale_factor =
            keys.do_rescale.unwrap_or(true).then(|| keys.rescale_factor.unwrap_or(class.rescale_factor));
        let (mean, std) = class.mean_std;
        let (mean, std) =
            (keys.image_mean.map_or(mean, Channels::values), keys.image_std.map_or(std, Channels::values));
        let mean_std = keys.do_normalize.unwrap_or(class.do_normalize).then_some((mean, std));
        if let Some(factor) = rescale_factor {
            ensure!(factor > 0.0, "rescale_factor is {factor}, it must be above 0");
        }
        if let Some((_, std)) = mean_std {
            ensure!(std.iter().all(|&std| std > 0.0), "image_std is {std:?}, each must be above 0");
        }
        // Pictures of a batch are padded to one size after all else; these have one.
        let alike = crop_size.is_some() || matches!(size, Some(Size::Exact { .. }));
        let do_pad = keys.do_pad.unwrap_or(false);
        ensure!(
            !do_pad || class.pads_to_square || (alike && keys.pad_size.is_none()),
            "do_pad is true, only LlavaImageProcessor's padding to a square is supported"
        );
        let pad = (do_pad && class.pads_to_square).then(|| keys.background_color.unwrap_or(mean.map(mean_byte)));
        Ok(Self::new(backend, size, resample, crop_size, rescale_factor, mean_std).with_pad(pad))
    }

    /// The object that [`ImageProcessor::from_json`] and Hugging Face's `AutoImageProcessor` read. The latter takes the
    /// backend from its caller and not from the name of the class, and no file with a key `backend` (5.23.0:
    /// "property 'backend' has no setter"); and it pads to squares in the colour of the mean, so that another one has a
    /// key of ours, `background_color`. Its processors that keep a picture's shape give rows of patches and no picture,
    /// so that a budget has keys of ours too, `min_image_tokens` and `max_image_tokens`.
    pub fn to_json(&self) -> Value {
        let (image_mean, image_std) = self.mean_std();
        let mut json = json!({
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": true,
            "do_resize": self.size.is_some(),
            "resample": self.resample as u8,
            "do_center_crop": self.crop_size.is_some(),
            "do_rescale": self.rescale_factor.is_some(),
            "do_normalize": self.mean_std.is_some(),
            "image_mean": image_mean,
            "image_std": image_std,
        });
        match self.size {
            Some(Size::ShortestEdge(edge)) => json["size"] = json!({"shortest_edge": edge}),
            Some(Size::Exact { height, width }) => json["size"] = json!({"height": height, "width": width}),
            Some(Size::Patches { patch_size, max_num_patches }) => {
                json["image_processor_type"] = json!("Siglip2ImageProcessor");
                json["patch_size"] = json!(patch_size);
                json["max_num_patches"] = json!(max_num_patches);
            }
            Some(Size::SoftTokens { patch_size, pooling_kernel_size, max_soft_tokens }) => {
                json["image_processor_type"] = json!("Gemma4UnifiedImageProcessor");
                json["patch_size"] = json!(patch_size);
                json["pooling_kernel_size"] = json!(pooling_kernel_size);
                json["max_soft_tokens"] = json!(max_soft_tokens);
            }
            Some(Size::Budget(budget)) => {
                json["patch_size"] = json!(budget.patch_size());
                json["min_image_tokens"] = json!(budget.min_image_tokens());
                json["max_image_tokens"] = json!(budget.max_image_tokens());
            }
            None => {}
        }
        if let Some((height, width)) = self.crop_size {
            json["crop_size"] = json!({"height": height, "width": width});
        }
        if let Some(color) = self.pad {
            json["image_processor_type"] = json!("LlavaImageProcessor");
            json["do_pad"] = json!(true);
            if color != image_mean.map(mean_byte) {
                json["background_color"] = json!(color);
            }
        }
        if let Some(factor) = self.rescale_factor {
            json["rescale_factor"] = json!(factor);
        }
        if self.backend == Backend::Pillow {
            let class = json["image_processor_type"].as_str().unwrap_or_default();
            json["image_processor_type"] = json!(format!("{class}Pil"));
        }
        json
    }
}

/// What a folder says of its image processor, and in which file: transformers looks into `processor_config.json` first.
fn stored(folder: &Path) -> Result<Option<(PathBuf, Value)>> {
    let read = |name: &str| -> Result<Option<(PathBuf, Value)>> {
        let path = folder.join(name);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let json = serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))?;
        Ok(Some((path, json)))
    };
    let nested = read("processor_config.json")?.and_then(|(path, mut json)| {
        let nested = json.get_mut("image_processor").map(Value::take).filter(|nested| !nested.is_null());
        nested.map(|nested| (path, nested))
    });
    let alone = read("preprocessor_config.json")?;
    if let (Some((_, nested)), Some((_, alone))) = (&nested, &alone)
        && nested != alone
    {
        tell_once(format!(
            "{} has an image processor in processor_config.json and another in preprocessor_config.json: the first is \
             taken, as transformers takes it",
            folder.display()
        ));
    }
    Ok(nested.or(alone))
}

/// The byte that `LlavaImageProcessor` pads with.
fn mean_byte(mean: f64) -> u8 {
    (mean * 255.0) as u8
}

/// Whether a folder is one of the published VoRA code's: by its config, which does not say the type of its LLM, or by
/// the processor that came with it.
fn is_published_vora(folder: &Path) -> bool {
    let read = |name: &str| -> Option<Value> { serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok() };
    let by_config = read("config.json")
        .is_some_and(|config| config["model_type"] == "vora" && config.get("llm_model_type").is_none());
    let by_processor = read("processor_config.json").is_some_and(|config| {
        let class = config["auto_map"]["AutoProcessor"].as_str();
        class.is_some_and(|class| class.ends_with("processing_vora.VoRAProcesser"))
    });
    by_config || by_processor
}

/// The class of processors that Hugging Face takes for the model in a folder; `Bit` where it says nothing known.
fn class_of_model(folder: &Path) -> &'static str {
    let config: Option<Value> =
        std::fs::read(folder.join("config.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match config.as_ref().and_then(|config| config["model_type"].as_str()) {
        Some("clip" | "clip_vision_model" | "aimv2" | "aimv2_vision_model") => "CLIP",
        Some("siglip" | "siglip_vision_model") => "Siglip",
        Some("siglip2" | "siglip2_vision_model") => "Siglip2",
        Some("vit") => "ViT",
        Some("llava") => "Llava",
        Some("chameleon") => "Chameleon",
        Some("gemma4_unified") => "Gemma4Unified",
        _ => "Bit",
    }
}

/// `CLIPImageProcessorFast` -> `CLIP`, torchvision. A name without an ending says nothing about the backend.
fn class_and_backend(name: &str) -> (&str, Option<Backend>) {
    let (name, backend) = match (name.strip_suffix("Fast"), name.strip_suffix("Pil")) {
        (Some(name), _) => (name, Some(Backend::Torchvision)),
        (_, Some(name)) => (name, Some(Backend::Pillow)),
        (None, None) => (name, None),
    };
    (name.trim_end_matches("ImageProcessor").trim_end_matches("FeatureExtractor"), backend)
}

/// The keys that are followed. Hugging Face's processors of these classes pass over all others.
#[derive(Deserialize)]
struct Keys {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    backend: Option<String>,
    use_fast: Option<bool>,
    do_resize: Option<bool>,
    size: Option<SizeKeys>,
    default_to_square: Option<bool>,
    use_square_size: Option<bool>,
    resample: Option<u8>,
    do_center_crop: Option<bool>,
    crop_size: Option<SizeKeys>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<Channels>,
    image_std: Option<Channels>,
    patch_size: Option<u32>,
    max_num_patches: Option<u32>,
    pooling_kernel_size: Option<u32>,
    max_soft_tokens: Option<u32>,
    min_image_tokens: Option<u32>,
    max_image_tokens: Option<u32>,
    do_pad: Option<bool>,
    pad_size: Option<Value>,
    background_color: Option<[u8; 3]>,
    data_format: Option<String>,
}

impl Keys {
    fn size(&self, class: &Class) -> Result<Size> {
        if let Some(max_image_tokens) = self.max_image_tokens {
            let patch_size = self.patch_size.context("max_image_tokens counts patches, patch_size is missing")?;
            let min_image_tokens = self.min_image_tokens.unwrap_or(1);
            return Ok(Size::Budget(TokenBudget::new(patch_size, min_image_tokens, max_image_tokens)?));
        }
        let to_square = self.default_to_square.unwrap_or(class.default_to_square);
        let size = match (class.size, &self.size) {
            (Size::Patches { patch_size, max_num_patches }, _) => Size::Patches {
                patch_size: self.patch_size.unwrap_or(patch_size),
                max_num_patches: self.max_num_patches.unwrap_or(max_num_patches),
            },
            (Size::SoftTokens { patch_size, pooling_kernel_size, max_soft_tokens }, _) => Size::SoftTokens {
                patch_size: self.patch_size.unwrap_or(patch_size),
                pooling_kernel_size: self.pooling_kernel_size.unwrap_or(pooling_kernel_size),
                max_soft_tokens: self.max_soft_tokens.unwrap_or(max_soft_tokens),
            },
            (_, Some(size)) => size.target("size", to_square)?,
            (size, None) => size,
        };
        ensure!(
            !matches!(size, Size::Patches { patch_size: 0, .. } | Size::Patches { max_num_patches: 0, .. }),
            "patch_size and max_num_patches must be at least 1"
        );
        if let Size::SoftTokens { patch_size, pooling_kernel_size, max_soft_tokens } = size {
            ensure!(
                (1..=1024).contains(&patch_size) && (1..=64).contains(&pooling_kernel_size),
                "patch_size is {patch_size} and pooling_kernel_size {pooling_kernel_size}, they go from 1 to 1024 and 64"
            );
            soft_token_budget("max_soft_tokens", max_soft_tokens)?;
        }
        Ok(size)
    }

    /// Height and width.
    fn crop_size(&self, class: &Class) -> Result<(u32, u32)> {
        let Some(size) = &self.crop_size else { return Ok((class.crop_size, class.crop_size)) };
        match size.target("crop_size", true)? {
            Size::Exact { height, width } => Ok((height, width)),
            _ => bail!("crop_size needs a height and a width"),
        }
    }
}

/// A number a channel, or one for all.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or three of them")]
enum Channels {
    Same(f64),
    Each([f64; 3]),
}

impl Channels {
    fn values(self) -> [f64; 3] {
        match self {
            Self::Same(value) => [value; 3],
            Self::Each(values) => values,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a size: a whole number, two of them, or an object with `height` and `width` or `shortest_edge`"
)]
enum SizeKeys {
    Number(u32),
    Pair([u32; 2]),
    Map(BTreeMap<String, Option<u32>>),
}

impl SizeKeys {
    /// A bare number is a square's side, or the shorter one; two are height and width.
    fn target(&self, key: &str, to_square: bool) -> Result<Size> {
        let size = match self {
            &Self::Number(edge) if to_square => Size::Exact { height: edge, width: edge },
            &Self::Number(edge) => Size::ShortestEdge(edge),
            &Self::Pair([height, width]) => Size::Exact { height, width },
            Self::Map(map) => {
                let given: Vec<_> = map.iter().filter_map(|(k, v)| v.map(|v| (k.as_str(), v))).collect();
                match given[..] {
                    [("height", height), ("width", width)] => Size::Exact { height, width },
                    [("shortest_edge", edge)] => Size::ShortestEdge(edge),
                    _ => bail!(
                        "{key} has [{}], supported are `shortest_edge` alone, or `height` and `width`",
                        given.iter().map(|(k, _)| format!("`{k}`")).collect::<Vec<_>>().join(", ")
                    ),
                }
            }
        };
        ensure!(
            !matches!(size, Size::ShortestEdge(0) | Size::Exact { height: 0, .. } | Size::Exact { width: 0, .. }),
            "{key} is 0, it must be at least 1"
        );
        Ok(size)
    }
}

/// What a class of processors does where its file says nothing.
struct Class {
    size: Size,
    default_to_square: bool, // a bare number as size is a square's side
    resample: Resample,
    do_center_crop: bool,
    crop_size: u32, // a square's side
    rescale_factor: f64,
    mean_std: ([f64; 3], [f64; 3]),
    do_normalize: bool,
    pads_to_square: bool, // what `do_pad` means, before all else
}

impl Class {
    fn named(name: &str) -> Result<Self> {
        let bit = Self {
            size: Size::ShortestEdge(224),
            default_to_square: false,
            resample: Resample::Bicubic,
            do_center_crop: true,
            crop_size: 224,
            rescale_factor: 1.0 / 255.0,
            mean_std: OPENAI_CLIP,
            do_normalize: true,
            pads_to_square: false,
        };
        let vit = Self {
            size: Size::Exact { height: 224, width: 224 },
            default_to_square: true,
            resample: Resample::Bilinear,
            do_center_crop: false,
            mean_std: IMAGENET_STANDARD,
            ..bit
        };
        Ok(match name {
            "Bit" | "CLIP" => bit,
            "ViT" => vit,
            "Siglip" => Self { resample: Resample::Bicubic, default_to_square: false, ..vit },
            "Siglip2" => Self { size: Size::Patches { patch_size: 16, max_num_patches: 256 }, ..vit },
            "Llava" => Self { pads_to_square: true, ..bit },
            "Chameleon" => Self {
                size: Size::ShortestEdge(512),
                resample: Resample::Lanczos,
                crop_size: 512,
                rescale_factor: 0.0078,
                mean_std: ([1.0; 3], [1.0; 3]),
                ..bit
            },
            "Gemma4Unified" => Self {
                size: Size::SoftTokens { patch_size: 16, pooling_kernel_size: 3, max_soft_tokens: 280 },
                do_center_crop: false,
                mean_std: ([0.0; 3], [1.0; 3]),
                do_normalize: false,
                ..bit
            },
            _ => bail!(
                "image_processor_type `{name}ImageProcessor` is not one of Bit, CLIP, ViT, Siglip, Siglip2, Llava, \
                 Chameleon, Gemma4Unified"
            ),
        })
    }
}

/// Hugging Face's `ChameleonImageProcessor` for pictures of `image_size` x `image_size` pixels; Chameleon's are 512.
///
/// The shorter side is resized to `image_size` by Lanczos, the middle cut out, and a byte becomes `0.0078 byte - 1`
/// (the public code of Chameleon has `byte / 127.5 - 1`, which is at most 0.011 more). Of Pillow's resizing, which
/// Hugging Face's slow processor has, less than one sample in a hundred differs, by one or two steps of a byte.
///
/// # Errors
/// Where `image_size` is 0.
pub fn chameleon_processor(image_size: u32) -> Result<ImageProcessor> {
    ImageProcessor::from_json(json!({
        "image_processor_type": "ChameleonImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }))
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::processor::Aspect;

    #[test]
    fn chameleons_processor_is_hugging_faces() {
        let golden = fixtures::arrays("vq");
        for (name, image_size) in [("shrunk", 32), ("enlarged", 64)] {
            let decoded = &golden[&format!("processor.{name}.bytes")]; // [height, width, 3], as Pillow decodes it
            let [height, width, 3] = decoded.shape[..] else { panic!("{:?}", decoded.shape) };
            let image = RgbImage::from_raw(width as u32, height as u32, decoded.bytes()).unwrap();
            let found = chameleon_processor(image_size).unwrap().preprocess(&image).unwrap();
            let expected = &golden[&format!("processor.{name}.pixel_values")];
            let difference = expected.difference(&[3, found.height, found.width], found.data.iter().copied());
            // Two steps of a byte: Pillow's weights have more bits.
            assert!(difference.largest <= 2.0 * 0.0078 + 1e-6, "{name}: {difference:?}");
            let others = found.data.iter().zip(&expected.values).filter(|(a, b)| (f64::from(**a) - **b).abs() > 1e-6);
            let (others, all) = (others.count(), found.data.len());
            assert!(others * 100 < all, "{name}: {others} of {all} samples differ");
        }
        assert!(chameleon_processor(0).is_err());
    }

    #[test]
    fn gemma_4s_processor_is_hugging_faces() {
        let golden = fixtures::arrays("gemma4_unified");
        let folder = fixtures::root().join("tiny/gemma4");
        let processor = ImageProcessor::open(&folder).unwrap();
        for name in ["enlarged", "shrunk", "wide", "fits", "sliver", "asked"] {
            let picture = &golden[&format!("processor.{name}.bytes")]; // [height, width, 3]
            let [height, width, 3] = picture.shape[..] else { panic!("{:?}", picture.shape) };
            let image = RgbImage::from_raw(width as u32, height as u32, picture.bytes()).unwrap();
            let found = processor.preprocess(&image).unwrap();
            let expected = &golden[&format!("processor.{name}.pixel_values")];
            let difference = expected.difference(&[3, found.height, found.width], found.data.iter().copied());
            assert_eq!(difference.largest, 0.0, "{name}");
            let again = ImageProcessor::from_json(processor.to_json()).unwrap().preprocess(&image).unwrap();
            assert_eq!(again, found, "{name}: to_json loses something");
        }
        let unsaid = ImageProcessor::from_json(json!({"image_processor_type": "Gemma4UnifiedImageProcessor"})).unwrap();
        assert_eq!(unsaid.output_size(480, 640).unwrap(), (672, 912)); // 14 x 19 tokens of 48 pixels
        assert_eq!(unsaid.output_size(1, 200).unwrap(), (48, 236 * 48));
        assert_eq!(unsaid.output_size(900, 1).unwrap(), (280 * 48, 48));
    }

    #[test]
    fn what_a_file_leaves_out_is_as_its_class_has_it() {
        let read = |json: Value| ImageProcessor::from_json(json).unwrap().to_json();
        let clip = read(json!({"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 28}));
        assert_eq!(clip["size"], json!({"shortest_edge": 30}));
        assert_eq!((&clip["crop_size"], &clip["resample"]), (&json!({"height": 28, "width": 28}), &json!(3)));
        let vit = read(json!({"image_processor_type": "ViTImageProcessorFast", "size": 30, "image_mean": 0.25}));
        assert_eq!((&vit["size"], &vit["do_center_crop"]), (&json!({"height": 30, "width": 30}), &json!(false)));
        assert_eq!(
            (&vit["image_mean"], &vit["image_processor_type"]),
            (&json!([0.25, 0.25, 0.25]), &json!("BitImageProcessor"))
        );
        let siglip = json!({"image_processor_type": "SiglipImageProcessor"});
        assert_eq!(read(siglip.clone())["size"], json!({"height": 224, "width": 224}));
        let with = |key: &str, value: Value| {
            let mut json = siglip.clone();
            json[key] = value;
            read(json)
        };
        let chameleon = read(json!({"image_processor_type": "ChameleonImageProcessor"}));
        assert_eq!((&chameleon["size"], &chameleon["resample"]), (&json!({"shortest_edge": 512}), &json!(1)));
        assert_eq!((&chameleon["crop_size"]["width"], &chameleon["rescale_factor"]), (&json!(512), &json!(0.0078)));
        assert_eq!(
            (&chameleon["image_mean"], &chameleon["image_std"]),
            (&json!([1.0, 1.0, 1.0]), &json!([1.0, 1.0, 1.0]))
        );
        assert_eq!(with("size", json!(30))["size"], json!({"shortest_edge": 30}));
        assert_eq!(with("size", json!([20, 30]))["size"], json!({"height": 20, "width": 30}));
        // The class says it: transformers refuses a file with the key `backend`.
        for pillow in [with("use_fast", json!(false)), read(json!({"image_processor_type": "CLIPImageProcessorPil"}))] {
            assert_eq!(
                (&pillow["image_processor_type"], &pillow["backend"]),
                (&json!("BitImageProcessorPil"), &Value::Null)
            );
            assert_eq!(read(pillow.clone()), pillow);
        }
    }

    #[test]
    fn a_file_without_a_class_gets_its_models() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        write("preprocessor_config.json", json!({"size": 28}));
        write("config.json", json!({"model_type": "vit"}));
        let vit = ImageProcessor::open(folder.path()).unwrap().to_json();
        assert_eq!((&vit["resample"], &vit["size"]), (&json!(2), &json!({"height": 28, "width": 28})));
        write("config.json", json!({"model_type": "aimv2_vision_model"}));
        let aimv2 = ImageProcessor::open(folder.path()).unwrap().to_json();
        assert_eq!((&aimv2["resample"], &aimv2["size"]), (&json!(3), &json!({"shortest_edge": 28})));
        write("config.json", json!({"model_type": "chameleon"}));
        let chameleon = ImageProcessor::open(folder.path()).unwrap().to_json();
        assert_eq!((&chameleon["resample"], &chameleon["rescale_factor"]), (&json!(1), &json!(0.0078)));
    }

    #[test]
    fn the_nested_processor_goes_before_the_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        let size = || ImageProcessor::open(folder.path()).unwrap().to_json()["size"].clone();
        write("config.json", json!({"model_type": "siglip"}));
        write("processor_config.json", json!({"processor_class": "LlavaProcessor", "size": 40}));
        let error = ImageProcessor::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no processor_config.json with an `image_processor`"), "{error}");
        write("preprocessor_config.json", json!({"size": {"height": 28, "width": 28}}));
        assert_eq!(size(), json!({"height": 28, "width": 28}));
        write("processor_config.json", json!({"image_processor": null}));
        assert_eq!(size(), json!({"height": 28, "width": 28}));
        write("processor_config.json", json!({"image_processor": {"size": {"height": 42, "width": 42}}}));
        assert_eq!(size(), json!({"height": 42, "width": 42}));
        write("processor_config.json", json!({"image_processor": {}})); // all of it as the class has it
        assert_eq!(size(), json!({"height": 224, "width": 224}));
    }

    #[test]
    fn published_folders_pad_with_black() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        let aspect = || ImageProcessor::open(folder.path()).unwrap().aspect();
        // As its generation files have it, which are copied beside a model.
        write("preprocessor_config.json", json!({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}));
        write("config.json", json!({"model_type": "vora", "llm": "Qwen/Qwen2.5-7B-Instruct"}));
        assert_eq!(aspect(), Aspect::Pad([0; 3]));
        write("config.json", json!({"model_type": "vora", "llm_model_type": "qwen2"}));
        assert_eq!(aspect(), Aspect::Crop);
        write("processor_config.json", json!({"auto_map": {"AutoProcessor": "processing_vora.VoRAProcesser"}}));
        assert_eq!(aspect(), Aspect::Pad([0; 3]));
        write("preprocessor_config.json", json!({"image_processor_type": "LlavaImageProcessor", "do_pad": true}));
        assert_eq!(aspect(), Aspect::Pad([122, 116, 104]));
    }

    #[test]
    fn keys_that_change_nothing_are_passed_over() {
        let read = |json: Value| ImageProcessor::from_json(json).unwrap().to_json();
        let uncropped = read(json!({"do_center_crop": false, "crop_size": {"shortest_edge": 3}}));
        assert_eq!((&uncropped["do_center_crop"], &uncropped["crop_size"]), (&json!(false), &Value::Null));
        let unresized = read(json!({"do_resize": false, "size": {"longest_edge": 3}, "resample": 5}));
        assert_eq!((&unresized["do_resize"], &unresized["size"]), (&json!(false), &Value::Null));
        let raw = read(json!({"do_normalize": false, "image_std": 0, "do_rescale": false, "rescale_factor": 0}));
        assert_eq!((&raw["do_normalize"], &raw["rescale_factor"]), (&json!(false), &Value::Null));
        assert_eq!(read(json!({"do_pad": true})), read(json!({}))); // all are cropped to one size
    }

    #[test]
    fn configs_that_cannot_be_followed_are_refused() {
        let refuse = |json: Value| format!("{:#}", ImageProcessor::from_json(json).unwrap_err());
        let error = refuse(json!({"image_processor_type": "Qwen2VLImageProcessorFast"}));
        assert!(error.contains("`Qwen2VLImageProcessor` is not one of Bit, CLIP, ViT, Siglip"), "{error}");
        let error = refuse(json!({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 0}));
        assert!(error.contains("max_num_patches must be at least 1"), "{error}");
        let gemma = |key: &str, value: u32| {
            let mut json = json!({"image_processor_type": "Gemma4UnifiedImageProcessor"});
            json[key] = value.into();
            refuse(json)
        };
        assert!(gemma("max_soft_tokens", 0).contains("max_soft_tokens is 0, Gemma 4's processor takes 70, 140, 280"));
        assert!(gemma("patch_size", 0).contains("patch_size is 0 and pooling_kernel_size 3"));
        assert!(refuse(json!({"resample": 5})).contains("resample is 5"));
        assert!(refuse(json!({"do_resize": "yes"})).contains("`do_resize`: invalid type: string"));
        assert!(refuse(json!({"do_pad": true, "do_center_crop": false})).contains("do_pad is true"));
        assert!(refuse(json!({"do_pad": true, "pad_size": {"height": 9, "width": 9}})).contains("do_pad is true"));
        let squared = json!({"image_processor_type": "LlavaImageProcessor", "do_pad": true, "background_color": 3});
        assert!(refuse(squared).contains("background_color"));
        assert!(refuse(json!({"use_square_size": true})).contains("use_square_size"));
        assert!(refuse(json!({"data_format": "channels_last"})).contains("data_format is `channels_last`"));
        assert!(refuse(json!({"backend": "jax"})).contains("backend is `jax`"));
        let error = refuse(json!({"size": {"shortest_edge": 3, "longest_edge": 5}}));
        assert!(error.contains("size has [`longest_edge`, `shortest_edge`], supported are"), "{error}");
        let error = refuse(json!({"size": {"height": 3, "width": 3, "max_pixels": 9}}));
        assert!(error.contains("size has [`height`, `max_pixels`, `width`]"), "{error}");
        assert!(refuse(json!({"crop_size": {"shortest_edge": 3}})).contains("crop_size needs a height and a width"));
        assert!(refuse(json!({"crop_size": 0})).contains("crop_size is 0"));
        assert!(refuse(json!({"image_std": [0.0, 1.0, 1.0]})).contains("image_std"));
        let error = format!("{:#}", ImageProcessor::open(Path::new("nowhere")).unwrap_err());
        assert!(error.contains("no preprocessor_config.json in nowhere, and no processor_config.json with"), "{error}");
    }
}
