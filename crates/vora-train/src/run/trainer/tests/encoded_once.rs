//! Every picture of a step goes through a Chameleon's image tokenizer once: it is read and written as the same tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use vora_image::RgbImage;
use vora_llm::VisionAttention;
use vora_model::{AdaptedLlm, ImageWriter};

use super::*;

/// A model that counts the pictures that it encodes, for reading or for writing.
#[derive(Debug)]
struct Counting {
    model: Box<dyn VisionLanguageModel>,
    encoded: Arc<AtomicUsize>,
}

impl Counting {
    fn count(&self, pictures: usize) {
        self.encoded.fetch_add(pictures, Ordering::Relaxed);
    }

    fn writer(&self) -> &dyn ImageWriter {
        self.model.image_writer().expect("a Chameleon writes pictures")
    }
}

impl VisionLanguageModel for Counting {
    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        self.count(pixel_values.size()[0] as usize);
        self.model.image_features(pixel_values)
    }

    fn image_writer(&self) -> Option<&dyn ImageWriter> {
        Some(self)
    }

    fn adapted(&self) -> &AdaptedLlm {
        self.model.adapted()
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        self.model.adapted_mut()
    }

    fn vision_attention(&self) -> VisionAttention {
        self.model.vision_attention()
    }

    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        self.model.image_grid(height, width)
    }

    fn image_marks(&self) -> Option<(i64, i64)> {
        self.model.image_marks()
    }

    fn llm_prefix(&self) -> &'static str {
        self.model.llm_prefix()
    }

    fn config_json(&self) -> Result<Value> {
        self.model.config_json()
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.model.tensors()
    }
}

impl ImageWriter for Counting {
    fn image_tokens(&self, pixel_values: &[Tensor]) -> Result<Tensor> {
        self.count(pixel_values.len());
        self.writer().image_tokens(pixel_values)
    }

    fn image_vocabulary(&self) -> &[i64] {
        self.writer().image_vocabulary()
    }

    fn begin_image_id(&self) -> i64 {
        self.writer().begin_image_id()
    }

    fn end_image_id(&self) -> i64 {
        self.writer().end_image_id()
    }

    fn drawn_grid(&self) -> (i64, i64) {
        self.writer().drawn_grid()
    }

    fn draw(&self, image_token_ids: &Tensor) -> Result<Vec<RgbImage>> {
        self.writer().draw(image_token_ids)
    }
}

#[test]
fn a_chameleons_pictures_are_encoded_once_a_step() {
    let folder = tempfile::tempdir().unwrap();
    for (recomputed, batch, accumulation) in [(false, 3, 1), (true, 1, 2)] {
        let set = [
            OTHER_SYSTEMS[3].to_owned(),
            format!("gradient_checkpointing={recomputed}"),
            format!("per_device_train_batch_size={batch}"),
            format!("gradient_accumulation_steps={accumulation}"),
        ];
        let mut trainer = trainer(config("smoke.yaml", folder.path(), &set.each_ref().map(String::as_str)));
        let encoded = Arc::new(AtomicUsize::new(0));
        let model = trainer.student.model;
        trainer.student.model = Box::new(Counting { model, encoded: encoded.clone() });
        // Every sample of `scenes` is about one picture.
        for step in 1..3 {
            trainer.train_step().unwrap();
            assert_eq!(encoded.load(Ordering::Relaxed), step * batch * accumulation, "recomputed: {recomputed}");
        }
    }
}
