//! A VoRA trained on data of one's own: a source that makes its samples, in place of files.
//!
//! ```sh
//! cargo run -p vora-examples --bin own_data -- LLM_FOLDER [RUN_FOLDER]
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use vora_data::{Record, RgbImage, Sample, SampleMaker, Source};
use vora_lora::LoraConfig;
use vora_recipe::{ModelConfig, TrainConfig};
use vora_text::{Message, Part};
use vora_train::data::{HeldOut, Sources};
use vora_train::tch::Device;
use vora_train::{Options, Outcome, Silent, Trainer};

/// Pictures of one grey each, and whether it is a light one. The same number is always the same sample: so a run goes on
/// where it stopped, and threads may make samples in any order.
struct Greys {
    maker: Arc<SampleMaker>,
    first: u64,
}

impl Source for Greys {
    fn len(&self) -> Option<u64> {
        Some(100)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let grey = ((self.first + index) * 37 % 256) as u8;
        let picture = RgbImage::from_pixel(56, 56, [grey; 3].into());
        let answer = if grey < 128 { "dark" } else { "light" };
        let record = Record {
            id: format!("grey {grey}"),
            frames: vec![String::new()], // a place for each picture
            messages: vec![
                Message::of_parts("user", vec![Part::Image, Part::Text("Is it dark or light?".to_owned())]),
                Message::new("assistant", answer),
            ],
            rejected: None,
            notes: Vec::new(),
        };
        self.maker.conversation(&record, &[picture])
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let llm = args.next().context("usage: own_data LLM_FOLDER [RUN_FOLDER]")?;
    let output_dir = args.next().map_or_else(|| std::env::temp_dir().join("vora-own-data"), PathBuf::from);

    let config = TrainConfig {
        output_dir,
        overwrite_output_dir: true,
        max_steps: 10,
        learning_rate: 1e-3,
        model: ModelConfig {
            llm,
            patch_size: Some(14),
            image_size: 56,
            vision_embedding_intermediate_size: Some(64),
            lora: Some(LoraConfig::new(4, 2)), // r, layers
            ..ModelConfig::default()
        },
        ..TrainConfig::default()
    };
    let resolve = |name: &str| Ok(PathBuf::from(name)); // or vora-hub's cache
    let maker = Arc::new(SampleMaker::new(vora_student::preparation(&config, &resolve)?));
    let source = |first| Arc::new(Greys { maker: maker.clone(), first });
    let sources = Sources::own("greys", source(0)).with_held_out(HeldOut::new("test", source(1000), 20));

    let mut trainer = Trainer::with_data(config, Options::new(Device::Cpu, &resolve), sources)?;
    for _ in 0..3 {
        let metrics = trainer.train_step()?;
        println!("step {}  loss {:.4}", metrics.step, metrics.loss);
    }
    // The rest of the run, its evaluation, and `final/`, which `vora ask` and `vora merge` open.
    if let Outcome::Finished(report) = trainer.train(&mut Silent)? {
        let score = &report.0["test"]["turn"];
        println!("exact match {:.2} of {}, blind {:?}", score.exact_match, score.n, score.blind_exact_match);
    }
    Ok(())
}
