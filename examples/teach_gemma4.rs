//! A Gemma 4 Unified in the trainer: LoRA on its decoder and the matrix that it sees through learn from answers alone.
//!
//! ```sh
//! cargo run -p vora-examples --bin teach_gemma4 -- GEMMA4_FOLDER [RUN_FOLDER]
//! vora ask RUN_FOLDER/final picture.png "What color is the circle?"
//! ```
//!
//! `final/` is an adapter that PEFT puts on `Gemma4UnifiedForConditionalGeneration`, with the embedder's weights beside it;
//! `vora merge` makes a folder of it that transformers opens.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use vora_data::SampleMaker;
use vora_data::scenes::ScenesConfig;
use vora_image::ImageProcessor;
use vora_lora::LoraConfig;
use vora_model::{Gemma4Unified, Weights};
use vora_recipe::{DataConfig, ModelConfig, ModelType, TrainConfig, TrainData};
use vora_student::{Pictures, Student, StudentParts};
use vora_train::data::Sources;
use vora_train::tch::{Device, Kind};
use vora_train::{Options, Silent, Trainer};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let gemma = args.next().context("usage: teach_gemma4 GEMMA4_FOLDER [RUN_FOLDER]")?;
    let output_dir = args.next().map_or_else(|| std::env::temp_dir().join("vora-teach-gemma4"), PathBuf::from);
    let (folder, seed) = (PathBuf::from(&gemma), 0);

    let new = Weights::random(seed, Device::Cpu, Kind::Float);
    // By names; in layers that have no such matrix, as the values' where keys are values too, there is nothing to adapt.
    let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let lora = LoraConfig::of_modules(8, targets); // on all layers
    let trains_embedder = true;
    let model = Gemma4Unified::open_to_teach(&folder, &gemma, Some(&lora), trains_embedder, &new)?;
    let token_size = model.vision_embedder().config().token_size();

    let image_size = token_size * (96 / token_size).max(1); // of the scenes; they go through Gemma's own processor
    let config = TrainConfig {
        output_dir,
        overwrite_output_dir: true,
        seed,
        max_steps: 5,
        model: ModelConfig { model_type: ModelType::Own, llm: gemma, image_size, ..ModelConfig::default() },
        data: DataConfig {
            train: TrainData {
                scenes: Some(ScenesConfig { image_size: u32::try_from(image_size)?, ..ScenesConfig::default() }),
                ..TrainData::default()
            },
            ..DataConfig::default()
        },
        ..TrainConfig::default()
    };
    let pictures = Pictures::new(ImageProcessor::open(&folder)?, token_size);
    let parts = StudentParts { model: Box::new(model), trained: new, llm: None, llm_folder: folder, pictures };
    let student = Student::from_parts(parts, &config)?;

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
    println!("adapters and embedder lie in {}", output_dir.join("final").display());
    Ok(())
}
