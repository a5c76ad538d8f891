//! The run file: one YAML file is one run. [`TrainConfig`] is what it is read into: every key with its default, what the
//! keys must be, `key.key=value` overrides, the schedule of the learning rate, and what two runs differ in.
//!
//! It opens no model and no data, computes with no tensor, and trains nothing: `vora-train` does. Keys of a model's own
//! config, such as `lora`, are read into the types of the crates that they are for.
//!
//! ```
//! use vora_recipe::TrainConfig;
//!
//! # fn main() -> anyhow::Result<()> {
//! let yaml = "
//! output_dir: runs/example
//! max_steps: 100
//! warmup_steps: 10
//! lr_scheduler_type: cosine
//! model:
//!   llm: HuggingFaceTB/SmolLM2-135M-Instruct
//!   patch_size: 14
//!   image_size: 56
//!   lora: { layers: 12, r: 32 }
//! data:
//!   train: { scenes: {} }
//! ";
//! let config = TrainConfig::parse(yaml, &["model.lora.r=64".to_owned()])?;
//! assert_eq!(config.model.lora.as_ref().map(|lora| lora.r), Some(64));
//! assert_eq!(config.schedule(100).factor(5), 0.5); // halfway through the warm-up
//!
//! // The same made in code; the trainer refuses it by the same words.
//! # use vora_data::scenes::ScenesConfig;
//! # use vora_lora::LoraConfig;
//! use vora_recipe::{DataConfig, ModelConfig, TrainData};
//! let made = TrainConfig {
//!     output_dir: "runs/example".into(),
//!     max_steps: 100,
//!     model: ModelConfig {
//!         llm: "HuggingFaceTB/SmolLM2-135M-Instruct".to_owned(),
//!         patch_size: Some(14),
//!         image_size: 56,
//!         lora: Some(LoraConfig::new(64, 12)), // r, layers
//!         ..ModelConfig::default()
//!     },
//!     data: DataConfig {
//!         train: TrainData { scenes: Some(ScenesConfig::default()), ..TrainData::default() },
//!         ..DataConfig::default()
//!     },
//!     ..TrainConfig::default()
//! };
//! let made = made.checked()?;
//! assert_eq!((made.model, made.seed), (config.model, config.seed));
//!
//! let error = TrainConfig::parse(&yaml.replace("r: 32", "rank: 32"), &[]).unwrap_err();
//! assert!(error.to_string().contains("unknown field `rank`"));
//! # Ok(())
//! # }
//! ```

mod anchor;
mod checks;
mod data;
mod distill;
mod loss;
mod model;
mod optim;
mod overrides;
mod run;
mod schedule;

pub use anchor::TextAnchor;
pub use data::{
    DataConfig, DataFetch, DataPath, DataPreprocess, EvalData, Expand2Square, FramesOps, HfImageTransform, Steps,
    TrainData, VqaProcessorParams,
};
pub use distill::{DistillConfig, Pairing, WeightSchedule};
pub use loss::Loss;
pub use model::{ImageAspectRatio, ModelConfig, ModelType, TeacherStart, VqTraining, Way};
pub use optim::{LearningRates, OptimConfig};
pub use overrides::Difference;
pub use run::{DdpBackend, Strategy, TrainConfig, split_of};
pub use schedule::{Curve, Ramp, Schedule, SchedulerKwargs};
