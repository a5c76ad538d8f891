//! A tiny model of random weights, some of whose pictures do harm.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use base64::Engine as _;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use vora_infer::{Assistant, RgbImage};
use vora_llm::{CausalLm, LlmConfig, VisionAttention};
use vora_lora::{ActsOn, BaseModel, LoraConfig, save_adapter};
use vora_model::{AdaptedLlm, Input, VisionLanguageModel, Vora, VoraConfig};
use vora_torch::weights::Weights;

/// The picture that libtorch throws on.
pub(crate) const WHITE: [u8; 3] = [255; 3];
/// The picture that takes its time.
pub(crate) const BLACK: [u8; 3] = [0; 3];
/// How much.
pub(crate) const SLOW: Duration = Duration::from_millis(300);

#[derive(Debug)]
struct Tiny(Vora);

/// Ready to answer; its adapters are apart.
pub(crate) fn assistant() -> Assistant {
    assistant_with(|_| {})
}

/// The same, of a folder that is changed before it is opened.
pub(crate) fn assistant_with(change: impl FnOnce(&Path)) -> Assistant {
    let llm = fixtures::root().join("tiny/llm");
    let folder = tempfile::tempdir().unwrap();
    for name in
        ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"]
    {
        std::fs::copy(llm.join(name), folder.path().join(name)).unwrap();
    }
    let half = [0.5; 3];
    let processor = json!({
        "image_processor_type": "LlavaImageProcessor", "do_resize": true, "size": {"height": 16, "width": 16},
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": half, "image_std": half,
        "resample": 2, "do_convert_rgb": true, "do_pad": false, "do_center_crop": false,
    });
    std::fs::write(folder.path().join("preprocessor_config.json"), processor.to_string()).unwrap();
    let weights = Weights::random(9, Device::Cpu, Kind::Float);
    let mut model = Vora::load(VoraConfig::new(LlmConfig::open(&llm).unwrap(), 24, 4, 16), &weights).unwrap();
    let (lora, adapters) =
        (LoraConfig { acts_on: ActsOn::All, ..LoraConfig::new(4, 3) }, Weights::random(5, Device::Cpu, Kind::Float));
    model.attach("seeing", &lora, &adapters).unwrap();
    shake(&adapters, 3);
    change(folder.path());
    Assistant::new(Box::new(Tiny(model)), folder.path()).unwrap()
}

/// The same with adapters `cats` and `dogs` for whoever asks for them.
pub(crate) fn assistant_of_several() -> Assistant {
    let (mut assistant, root) = (assistant(), tempfile::tempdir().unwrap());
    for (name, seed) in [("cats", 1), ("dogs", 2)] {
        let llm = LlmConfig::open(&fixtures::root().join("tiny/llm")).unwrap();
        let mut llm = AdaptedLlm::new(CausalLm::load(&llm, &Weights::random(9, Device::Cpu, Kind::Float)).unwrap());
        let (lora, adapters) = (LoraConfig::new(3, 4), Weights::random(seed, Device::Cpu, Kind::Float));
        llm.attach(name, &lora, &adapters).unwrap();
        shake(&adapters, seed);
        let folder = root.path().join(name);
        save_adapter(&folder, &lora, BaseModel::causal_lm("tiny"), &llm.adapter_tensors().unwrap()).unwrap();
        assistant.add_adapter(name, &folder, &|name| anyhow::bail!("{name} is nowhere")).unwrap();
    }
    assistant
}

/// Gives adapters a B that is not zero.
fn shake(adapters: &Weights, seed: u64) {
    let random = fixtures::Random::new(seed);
    for (_, tensor) in adapters.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
        tch::no_grad(|| tensor.shallow_clone().copy_(&(random.normal(tensor.size()) * 0.2)));
    }
}

/// A picture of one colour as a `data:` address.
pub(crate) fn picture(color: [u8; 3]) -> String {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = RgbImage::from_pixel(16, 16, color.into());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    data(bytes.get_ref())
}

/// Bytes as a `data:` address.
pub(crate) fn data(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

impl VisionLanguageModel for Tiny {
    fn adapted(&self) -> &AdaptedLlm {
        self.0.adapted()
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        self.0.adapted_mut()
    }

    fn vision_attention(&self) -> VisionAttention {
        self.0.vision_attention()
    }

    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        self.0.image_grid(height, width)
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        self.0.image_features(pixel_values)
    }

    fn llm_prefix(&self) -> &'static str {
        self.0.llm_prefix()
    }

    fn config_json(&self) -> Result<Value> {
        self.0.config_json()
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.tensors()
    }

    fn embed(&self, input: &Input) -> Result<Tensor> {
        for pixels in &input.pixel_values {
            match pixels.mean(Kind::Float).double_value(&[]) {
                1.0 => drop(
                    Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))
                        .matmul(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))),
                ),
                -1.0 => std::thread::sleep(SLOW),
                _ => {}
            }
        }
        self.0.embed(input)
    }
}
