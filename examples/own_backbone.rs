//! A model of one's own in the trainer: convolutions see, a frozen language model with LoRA answers.
//!
//! ```sh
//! cargo run -p vora-examples --bin own_backbone -- LLM_FOLDER [RUN_FOLDER]
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vora_data::SampleMaker;
use vora_data::scenes::ScenesConfig;
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample};
use vora_llm::{CausalLm, LlmConfig, VisionAttention};
use vora_lora::LoraConfig;
use vora_model::{AdaptedLlm, VisionLanguageModel, Weights};
use vora_recipe::{DataConfig, ModelConfig, ModelType, TrainConfig, TrainData};
use vora_student::{Pictures, Student, StudentParts};
use vora_torch::weights::Init;
use vora_train::data::Sources;
use vora_train::tch::{Device, Kind, Tensor};
use vora_train::{Options, Silent, Trainer};

/// Pixels of a picture's side that become one token, by three convolutions that halve it.
const PATCH: i64 = 8;

/// Three convolutions of stride 2, and a projection to the width of the LLM.
#[derive(Debug)]
struct ConvLm {
    llm: AdaptedLlm,
    convolutions: [Tensor; 3],
    proj: Tensor, // [hidden, channels]
}

impl ConvLm {
    const CHANNELS: i64 = 32;

    /// Everything that is trained comes from `trained`, by the name that it has on disk.
    fn new(llm: AdaptedLlm, trained: &Weights) -> Result<Self> {
        let stem = trained.pp("stem");
        let convolution = |index: i64| {
            let inputs = if index == 0 { 3 } else { Self::CHANNELS };
            stem.parameter(&format!("{index}.weight"), &[Self::CHANNELS, inputs, 2, 2], Init::KaimingUniform)
        };
        let convolutions = [convolution(0)?, convolution(1)?, convolution(2)?];
        let hidden = llm.llm().config().hidden_size;
        let proj = stem.parameter("proj.weight", &[hidden, Self::CHANNELS], Init::Normal { std: 0.02 })?;
        Ok(Self { llm, convolutions, proj })
    }
}

impl VisionLanguageModel for ConvLm {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn vision_attention(&self) -> VisionAttention {
        VisionAttention::Bidirectional
    }

    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        anyhow::ensure!(height % PATCH == 0 && width % PATCH == 0, "a side is no multiple of {PATCH}");
        Ok((height / PATCH, width / PATCH))
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        let none = None::<Tensor>;
        let convolve =
            |x: Tensor, weight: &Tensor| x.conv2d(weight, none.as_ref(), [2, 2], [0, 0], [1, 1], 1).gelu("none");
        let features = self.convolutions.iter().fold(pixel_values.shallow_clone(), convolve); // [n, channels, rows, columns]
        let features = features.flatten(2, 3).transpose(1, 2).linear(&self.proj, none.as_ref()); // [n, tokens, hidden]
        features.to_kind(self.llm().kind())
    }

    fn llm_prefix(&self) -> &'static str {
        "llm."
    }

    fn config_json(&self) -> Result<Value> {
        Ok(json!({"model_type": "conv_lm", "llm": self.llm().config(), "patch_size": PATCH}))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let below = |(name, tensor): (String, Tensor)| (format!("llm.{name}"), tensor);
        let llm = self.llm().tensors().into_iter().chain(self.llm.adapter_tensors()?).map(below);
        let stem = self.convolutions.iter().enumerate().map(|(i, t)| (format!("stem.{i}.weight"), t.shallow_clone()));
        Ok(llm.chain(stem).chain([("stem.proj.weight".to_owned(), self.proj.shallow_clone())]).collect())
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let llm = args.next().context("usage: own_backbone LLM_FOLDER [RUN_FOLDER]")?;
    let output_dir = args.next().map_or_else(|| std::env::temp_dir().join("vora-own-backbone"), PathBuf::from);

    let lora = LoraConfig::new(4, 2); // r, layers
    let config = TrainConfig {
        output_dir,
        overwrite_output_dir: true,
        max_steps: 5,
        model: ModelConfig {
            model_type: ModelType::Own,
            llm,
            image_size: 56,
            lora: Some(lora.clone()),
            ..ModelConfig::default()
        },
        data: DataConfig {
            train: TrainData { scenes: Some(ScenesConfig::default()), ..TrainData::default() },
            ..DataConfig::default()
        },
        ..TrainConfig::default()
    };

    let llm_folder = PathBuf::from(&config.model.llm);
    let weights = Weights::open(&llm_folder, Device::Cpu, Kind::Float)?;
    let mut llm = AdaptedLlm::new(CausalLm::load(&LlmConfig::open(&llm_folder)?, &weights)?);
    weights.finish()?;
    let trained = Weights::random(config.seed, Device::Cpu, Kind::Float);
    llm.attach("default", &lora, &trained.pp("llm"))?;
    let model = Box::new(ConvLm::new(llm, &trained)?);
    let (mean, std) = IMAGENET_DEFAULT;
    let pictures = Pictures::new(ImageProcessor::square(56, mean, std, Resample::Bicubic), PATCH);
    let student = Student::from_parts(StudentParts { model, trained, llm: None, llm_folder, pictures }, &config)?;

    let maker = Arc::new(SampleMaker::new(student.preparation(&config)?));
    let sources = Sources::open(&config, &maker)?;
    let resolve = |name: &str| Ok(PathBuf::from(name));
    let output_dir = config.output_dir.clone();
    let mut trainer = Trainer::from_parts(config, Options::new(Device::Cpu, &resolve), student, sources)?;
    for _ in 0..3 {
        let metrics = trainer.train_step()?;
        println!("step {}  loss {:.4}", metrics.step, metrics.loss);
    }
    trainer.train(&mut Silent)?;
    println!("adapters and convolutions lie in {}", output_dir.join("final").display());
    Ok(())
}
