//! Runs of recipes, whole and gone on with, and what they leave asked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use vora_image::{ImageProcessor, RgbImage};
use vora_model::{Input, VisionLanguageModel};
use vora_recipe::TrainConfig;
use vora_text::{Message, Piece};
use vora_train::{Options, Outcome, Silent, Trainer};

/// A path from the workspace on.
pub(crate) fn resolve(name: &str) -> Result<PathBuf> {
    Ok(fixtures::root().parent().context("the workspace")?.join(name))
}

/// A recipe with changes, whose run goes into `folder`.
pub(crate) fn recipe(name: &str, folder: &Path, more: &[&str]) -> Result<TrainConfig> {
    let file = resolve("crates/vora-train/recipes")?.join(name);
    let set = more.iter().map(|&set| set.to_owned()).chain([format!("output_dir={}/run", folder.display())]);
    TrainConfig::open(&file, &set.collect::<Vec<_>>())
}

/// The trained tensors at the end of the recipe's run, gone on with from its middle where it `stops`.
pub(crate) fn parameters(name: &str, folder: &Path, more: &[&str], stops: bool) -> Vec<(String, Tensor)> {
    let open = |more: &[&str], resume| {
        let mut options = Options::new(Device::Cpu, &resolve);
        options.resume = resume;
        Trainer::new(recipe(name, folder, more).unwrap(), options).unwrap()
    };
    let mut trainer = open(more, false);
    if stops {
        let half = recipe(name, folder, more).unwrap().save_steps;
        while trainer.step() < half {
            trainer.train_step().unwrap();
        }
        trainer.save(&mut Silent).unwrap();
        drop(trainer);
        trainer = open(&[more, &["overwrite_output_dir=false"]].concat(), true);
        assert_eq!(trainer.step(), half);
    }
    let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
    assert!(!report.0.is_empty(), "the held-out split was asked about");
    trainer.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect()
}

/// Logits at the end of a question about a picture.
pub(crate) fn asked(model: &dyn VisionLanguageModel, folder: &Path, picture: &RgbImage) -> Tensor {
    let tokenizer = vora_text::Tokenizer::open(folder).unwrap().for_processor(model.has_processor());
    let chat = vora_text::ChatTemplate::open(folder).unwrap();
    let pieces: Vec<Piece> = chat.encode_prompt(&tokenizer, &[Message::question_about(1, "What shape?")]).unwrap();
    let pixels = ImageProcessor::open(folder).unwrap().preprocess(picture).unwrap();
    let input = Input::prompt(&pieces, vec![vora_vision::pixel_values(&pixels)], model).unwrap();
    let output = tch::no_grad(|| model.forward(&input, 0)).unwrap();
    model.llm().logits(&output.last_hidden_state.select(1, -1))
}
