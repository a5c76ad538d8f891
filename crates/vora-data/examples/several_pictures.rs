//! How long a record's pictures take on one thread and on all: medians of interleaved rounds.
//!
//! ```sh
//! cargo run --example several_pictures -- 8 2048
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use image::codecs::jpeg::JpegEncoder;
use vora_data::{ConversationSource, Conversations, Preparation, SampleMaker, Source};
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, RgbImage};
use vora_text::{ChatTemplate, Tokenizer};

#[expect(clippy::print_stdout, reason = "what an example shows")]
fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u32>());
    let usage = "usage: several_pictures COUNT SIDE [ROUNDS]";
    let (count, side) = (args.next().context(usage)??, args.next().context(usage)??);
    let rounds = args.next().transpose()?.unwrap_or(5) as usize;
    let folder = tempfile::tempdir()?;
    let names: Vec<String> = (0..count).map(|number| format!("{number}.jpg")).collect();
    for (name, number) in names.iter().zip(0..) {
        let picture = RgbImage::from_fn(side, side, |x, y| [(x * y / 64) as u8, (x ^ y) as u8, number].into());
        JpegEncoder::new(std::fs::File::create(folder.path().join(name))?).encode_image(&picture)?;
    }
    let turns = [("human", "<image>".repeat(count as usize)), ("gpt", "Pictures.".to_owned())];
    let turns = turns.map(|(from, value)| serde_json::json!({"from": from, "value": value}));
    let record = serde_json::json!({"frames": names, "conversations": turns});
    std::fs::write(folder.path().join("data.jsonl"), record.to_string())?;

    let llm = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny/tokenizer");
    let (mean, std) = IMAGENET_DEFAULT;
    let processor = ImageProcessor::square(224, mean, std, Resample::Bicubic);
    let (tokenizer, chat) = (Tokenizer::open(&llm)?, ChatTemplate::open(&llm)?);
    let preparation = Preparation::new(tokenizer, chat, i64::MAX, processor, 14)?;
    let conversations = Conversations::open(&folder.path().join("data.jsonl"), folder.path())?;
    let source = ConversationSource::new(conversations, Arc::new(SampleMaker::new(preparation)));

    let threads = [1, std::thread::available_parallelism()?.get()];
    let pools = threads.map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build());
    let [one, all] = pools;
    let pools = [one?, all?];
    let mut seconds = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        let mut samples = Vec::new();
        for (pool, seconds) in pools.iter().zip(&mut seconds) {
            let start = Instant::now();
            samples.push(pool.install(|| source.sample(0))?);
            seconds.push(start.elapsed().as_secs_f64());
        }
        ensure!(samples[0] == samples[1], "the samples differ");
    }
    for (threads, mut seconds) in threads.iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        println!("{threads} threads: median {:.3} s of {seconds:.3?}", seconds[rounds / 2]);
    }
    Ok(())
}
