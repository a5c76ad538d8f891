//! What packing is worth: tokens a second through forward and backward, and the share of padding, of the same samples
//! of mixed lengths in rows of their own and packed.
//!
//! `cargo xtask bench packing` runs it. The samples are pictures of `scenes` with one to twelve turns about each, and
//! every third is words alone. Both ways take turns in every round; medians over the rounds are reported.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use tch::Device;
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Batch, Record, RecordKeys, Sample, SampleMaker, collate, pack};
use vora_llm::DropoutSeed;
use vora_recipe::TrainConfig;
use vora_student::{DeviceBatch, Student};
use vora_torch::runtime;

/// Measures rows with one sample against packed rows
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the language model
    #[arg(long)]
    llm: PathBuf,
    /// Samples
    #[arg(long, default_value_t = 32)]
    samples: u64,
    /// Rows of a batch of either kind
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    /// Tokens that packed rows have room for
    #[arg(long, default_value_t = 512)]
    row_len: usize,
    /// Rounds over all samples, behind one that is not counted
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// One way to lay the samples out, and what was measured of it.
struct Layout {
    name: &'static str,
    batches: Vec<Batch>,
    seconds: Vec<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.samples > 0 && args.batch_size > 0 && args.rounds > 0,
        "samples, batch size and rounds are at least 1"
    );
    let device = runtime::device(&args.device)?;
    let kind = runtime::kind("auto", device)?;
    let config = TrainConfig::parse(
        "model: { llm: LLM, patch_size: 14, image_size: 56, lora: { layers: 1, r: 32 } }\n\
         data: { train: { scenes: {} } }\noutput_dir: unused\nmax_steps: 1",
        &[],
    )?;
    let llm = args.llm.clone();
    let student = Student::new(&config, device, kind, &move |_| Ok(llm.clone()))?;
    let maker = SampleMaker::new(student.preparation(&config)?);
    let samples = samples(&maker, args.samples)?;
    let longest = samples.iter().map(|sample| sample.input_ids.len()).max().unwrap_or_default();
    ensure!(longest <= args.row_len, "--row-len is {}, the longest sample has {longest} tokens", args.row_len);

    let alone = samples.chunks(args.batch_size).map(|chunk| collate(chunk.to_vec(), 0)).collect();
    let packed = pack(samples, args.batch_size, args.row_len, 0);
    let mut layouts = [("a row each", alone), ("packed", packed)].map(|(name, batches)| Layout {
        name,
        batches,
        seconds: Vec::new(),
    });
    for round in 0..=args.rounds {
        for layout in &mut layouts {
            let seconds = layout.pass(&student, device)?;
            if round > 0 {
                layout.seconds.push(seconds);
            }
        }
    }

    println!(
        "{device:?}, {kind:?}, {} samples, {} rounds, batches of {} rows",
        args.samples, args.rounds, args.batch_size
    );
    for layout in &layouts {
        println!("{}", layout.report());
    }
    println!("packed rows take {:.2} of the time", layouts[1].median() / layouts[0].median());
    Ok(())
}

/// Conversations of one to twelve turns, with a picture or without.
fn samples(maker: &SampleMaker, count: u64) -> Result<Vec<Sample>> {
    let config = ScenesConfig { questions_per_image: 12, ..ScenesConfig::default() };
    let scenes = Scenes::new(config, Split::Train)?;
    let sample = |index: u64| {
        let turns = 1 + (index * 7 % 12) as usize;
        let has_picture = !index.is_multiple_of(3);
        let mut conversation = Vec::new();
        for (number, asked) in scenes.questions(index).iter().cycle().take(turns).enumerate() {
            let picture = if has_picture && number == 0 { "<image>\n" } else { "" };
            conversation.push(serde_json::json!({"from": "human", "value": format!("{picture}{}", asked.question)}));
            conversation.push(serde_json::json!({"from": "gpt", "value": asked.answer}));
        }
        let pictures = if has_picture { vec![scenes.render(index)] } else { Vec::new() };
        let frames = vec!["scene"; pictures.len()];
        let json = serde_json::json!({"id": index.to_string(), "frames": frames, "conversations": conversation});
        maker.conversation(&Record::parse(json.to_string().as_bytes(), &RecordKeys::default())?, &pictures)
    };
    (0..count).map(sample).collect()
}

impl Layout {
    /// Seconds that all batches take, forward and backward.
    fn pass(&self, student: &Student, device: Device) -> Result<f64> {
        let start = Instant::now();
        for batch in &self.batches {
            student.backward(&DeviceBatch::new(batch, device), DropoutSeed::new(0), |losses| losses.lm_sum)?;
            for (_, parameter) in student.parameters() {
                let mut gradient = parameter.grad();
                if gradient.defined() {
                    let _ = gradient.zero_();
                }
            }
        }
        runtime::synchronize(device);
        Ok(start.elapsed().as_secs_f64())
    }

    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    fn report(&self) -> String {
        let tokens: i64 = self.batches.iter().map(|batch| batch.spans.num_tokens()).sum();
        let slots: i64 = self.batches.iter().map(|batch| batch.batch * batch.seq).sum();
        format!(
            "{:<11} {:>4} batches, padding {:>5.1}%, {:>8.0} tokens/s",
            self.name,
            self.batches.len(),
            100.0 * (1.0 - tokens as f64 / slots as f64),
            tokens as f64 / self.median()
        )
    }
}
