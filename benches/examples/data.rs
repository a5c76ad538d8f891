//! Images a second of `vora_data::Loader` over a folder of pictures: read, decoded, resized, normalised, stacked.
//!
//! `cargo xtask bench data` runs it and `benches/data.py`, PyTorch's DataLoader over the same pictures, by turns.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vora_data::{Loader, LoaderConfig, Sample, Source};
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, open_image};
use vora_vision::stack;

/// Prints images a second
#[derive(Debug, Parser)]
struct Args {
    /// Folder of pictures
    folder: PathBuf,
    /// Side of the square they become
    #[arg(long)]
    size: u32,
    /// Worker threads
    #[arg(long)]
    workers: usize,
    /// Pictures in a batch
    #[arg(long)]
    batch: usize,
    /// Pictures to time, behind two batches that are not
    #[arg(long)]
    images: usize,
}

struct Pictures {
    paths: Vec<PathBuf>,
    processor: ImageProcessor,
}

impl Source for Pictures {
    fn len(&self) -> Option<u64> {
        Some(self.paths.len() as u64)
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let image = self.processor.preprocess(&open_image(&self.paths[index as usize])?)?;
        Ok(Sample {
            id: index.to_string(),
            input_ids: Vec::new(),
            targets: Vec::new(),
            spans: Vec::new(),
            images: vec![image],
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        })
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let entries = std::fs::read_dir(&args.folder).with_context(|| format!("cannot list {}", args.folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| {
        path.extension().is_some_and(|extension| ["jpg", "jpeg", "png"].iter().any(|e| extension == *e))
    });
    paths.sort();
    let (mean, std) = IMAGENET_DEFAULT;
    let source = Pictures { paths, processor: ImageProcessor::square(args.size, mean, std, Resample::Bicubic) };
    let config = LoaderConfig { batch_size: args.batch, num_workers: args.workers, ..LoaderConfig::default() };
    let mut loader = Loader::new(Arc::new(source), config)?;
    for _ in 0..2 {
        loader.next().context("the data never ends")??;
    }
    let (start, mut images) = (Instant::now(), 0);
    while images < args.images {
        let batch = loader.next().context("the data never ends")??;
        images += stack(&batch.images)?.size()[0] as usize;
    }
    ensure!(loader.num_skipped() == 0, "{} pictures could not be read", loader.num_skipped());
    println!("{:.2}", images as f64 / start.elapsed().as_secs_f64());
    Ok(())
}
