//! A VoRA taught block by block by an encoder of one's own: any frozen module that has hidden states.
//!
//! ```sh
//! cargo run -p vora-examples --bin own_teacher -- LLM_FOLDER [RUN_FOLDER]
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use vora_data::SampleMaker;
use vora_data::scenes::ScenesConfig;
use vora_lora::LoraConfig;
use vora_recipe::{DataConfig, ModelConfig, TrainConfig, TrainData};
use vora_student::{Student, Teacher};
use vora_torch::weights::{Init, Weights};
use vora_train::data::Sources;
use vora_train::tch::{Device, Kind, Tensor};
use vora_train::{Options, Trainer};

/// Convolutions over patches of 14 pixels, then three that look at the neighbours: a stand-in for an encoder that was
/// trained.
#[derive(Debug)]
struct ConvNet {
    stem: Tensor,        // [hidden, 3, 14, 14]
    blocks: Vec<Tensor>, // [hidden, hidden, 3, 3]
}

impl ConvNet {
    const HIDDEN: i64 = 24;

    /// From a seed, so that a run that goes on meets the same teacher; one that was trained comes from `Weights::open`.
    fn new() -> Result<Self> {
        let weights = Weights::random(7, Device::Cpu, Kind::Float);
        let new = |name: &str, shape: &[i64]| weights.get(name, shape, Init::Normal { std: 0.05 });
        let block = |idx| new(&format!("blocks.{idx}"), &[Self::HIDDEN, Self::HIDDEN, 3, 3]);
        Ok(Self { stem: new("stem", &[Self::HIDDEN, 3, 14, 14])?, blocks: (0..3).map(block).collect::<Result<_>>()? })
    }
}

impl Teacher for ConvNet {
    fn num_hidden_layers(&self) -> usize {
        self.blocks.len()
    }

    fn hidden_size(&self) -> i64 {
        Self::HIDDEN
    }

    fn grid(&self, height: i64, width: i64) -> (i64, i64) {
        (height / 14, width / 14)
    }

    fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let none = None::<Tensor>;
        let mut state = pixel_values.conv2d(&self.stem, none.as_ref(), [14, 14], [0, 0], [1, 1], 1);
        let mut states = vec![state.shallow_clone()];
        for block in &self.blocks[..num_layers] {
            state = &state + state.conv2d(block, none.as_ref(), [1, 1], [1, 1], [1, 1], 1).relu();
            states.push(state.shallow_clone());
        }
        // [n, hidden, rows, columns] -> [n, rows * columns, hidden]
        states.into_iter().map(|state| state.flatten(2, 3).transpose(1, 2)).collect()
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let llm = args.next().context("usage: own_teacher LLM_FOLDER [RUN_FOLDER]")?;
    let output_dir = args.next().map_or_else(|| std::env::temp_dir().join("vora-own-teacher"), PathBuf::from);

    let scenes = ScenesConfig::default(); // pictures of 56 x 56, drawn on the way
    let config = TrainConfig {
        output_dir,
        overwrite_output_dir: true,
        max_steps: 5,
        model: ModelConfig {
            llm,
            patch_size: Some(14),
            image_size: 56,
            vision_embedding_intermediate_size: Some(64),
            lora: Some(LoraConfig::new(4, 2)),
            ..ModelConfig::default()
        },
        data: DataConfig { train: TrainData { scenes: Some(scenes), ..TrainData::default() }, ..DataConfig::default() },
        ..TrainConfig::default()
    };
    let resolve = |name: &str| Ok(PathBuf::from(name));
    let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve)?;
    let student = student.with_teacher(Box::new(ConvNet::new()?), &config)?;
    let maker = Arc::new(SampleMaker::new(student.preparation(&config)?));
    let sources = Sources::open(&config, &maker)?;

    let mut trainer = Trainer::from_parts(config, Options::new(Device::Cpu, &resolve), student, sources)?;
    for _ in 0..5 {
        let metrics = trainer.train_step()?;
        println!("step {}  cosine loss of each block {:.3?}", metrics.step, metrics.distill_blocks);
    }
    Ok(())
}
