//! `vora convert`: a checkpoint in another layout, dtype, or number of files, with a report of every tensor.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use comfy_table::{Table, presets};
use tch::Kind;
use vora_files::ensure_vacant;
use vora_gguf::write::FileKind;
use vora_model::convert::{Change, Conversion, Layout, Options, Report};

use crate::size;

/// Write a checkpoint in another layout, dtype, or number of files.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Layouts, and what they become:
  gguf                 a language model in one file         llm, gguf
  llm                  a language model, as HF has it       llm, gguf
  vora                 a VoRA, published or merged here     vora, llm, gguf, mmproj
  vora-unmerged        a VoRA, adapters beside the weights  vora-unmerged, vora, peft, frozen-llm
  peft                 a VoRA's adapter: a run's final/     vora-unmerged, vora
  peft-llm             a plain language model's adapter     llm, gguf, with the adapter merged
  peft-llava           a LLaVA's adapter                    llava, llava-transformers5, with the adapter merged
  llava                LLaVA, language_model.model...       llava, llava-transformers5, llm, gguf, mmproj
  llava-transformers5  LLaVA, model.language_model...       llava, llava-transformers5, llm, gguf, mmproj
  mmproj               a model's eyes in one GGUF file
  safetensors          any others                           safetensors

What SRC is, its files say. vora-unmerged is written as the published VoRA code reads it: one rank, no alpha, and a
bias beside every adapter. frozen-llm is the LLM as it was below the adapters. Without --to the layout stays, and
files and dtypes change alone. Nothing is computed but merged adapters: what is kept or renamed keeps its bytes. A
tokenizer, chat template or image processor in an adapter's own folder goes before its base's. What was written is
opened once, or nothing is kept. A GGUF file has tokenizer and chat template in it; --dtype says what its matrices
are, vectors and norms are f32. mmproj is the second file that llama.cpp takes: of a LLaVA the encoder, a CLIP or a
SigLIP, up to the layer that is projected, and the projection; of a VoRA its vision_embedding, gemma4_unified alone.

Examples:
  vora convert model-Q8_0.gguf model --dtype bf16
  vora convert runs/scenes/merged llm --to llm
  vora convert runs/scenes/final unmerged --to vora-unmerged
  vora convert unmerged adapter --to peft
  vora convert llava-1.5-7b-hf renamed --to llava-transformers5 --dry-run
  vora convert llava-1.5-7b-hf vicuna --to llm
  vora convert runs/scenes/llm for-llama.cpp --to gguf --dtype q8_0
  vora convert llava-1.5-7b-hf eyes-for-llama.cpp --to mmproj --dtype f16
  vora convert big smaller-files --max-shard-size 2GB
  vora convert runs/scenes/merged for-transformers --hf")]
pub(crate) struct Args {
    /// A folder, a .safetensors or a .gguf file, or a model's name in the hub's cache
    src: String,
    /// The folder to write; it must not be there, or be empty
    dst: PathBuf,
    /// The layout to write
    #[arg(long, value_name = "LAYOUT")]
    to: Option<Layout>,
    /// The dtype of all tensors of real numbers, as they are where it is absent; q8_0 and q4_0 in GGUF files alone
    #[arg(long)]
    dtype: Option<Dtype>,
    /// The most bytes of tensors in a file: KB, MB, GB, TB, or KiB, MiB, GiB, TiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size::bytes)]
    max_shard_size: u64,
    /// The model below an adapter, where it is not the one that the adapter names
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Also write what HF transformers opens a VoRA's folder with: the code of its classes, and their settings
    #[arg(long)]
    hf: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    #[value(alias = "fp32", alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp16", alias = "float16", alias = "half")]
    F16,
    #[value(name = "q8_0")]
    Q8,
    #[value(name = "q4_0")]
    Q4,
}

impl Dtype {
    /// Torch's kind; none of blocks with a scale, which only GGUF files have.
    fn kind(self) -> Option<Kind> {
        match self {
            Self::F32 => Some(Kind::Float),
            Self::Bf16 => Some(Kind::BFloat16),
            Self::F16 => Some(Kind::Half),
            Self::Q8 | Self::Q4 => None,
        }
    }

    fn in_gguf(self) -> FileKind {
        match self {
            Self::F32 => FileKind::F32,
            Self::Bf16 => FileKind::BF16,
            Self::F16 => FileKind::F16,
            Self::Q8 => FileKind::Q8_0,
            Self::Q4 => FileKind::Q4_0,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let src = PathBuf::from(&args.src);
    let src = if src.exists() { src } else { vora_hub::resolve(&args.src)? };
    ensure_vacant(&args.dst)?;
    let kind = args.dtype.map(Dtype::kind);
    ensure!(
        kind != Some(None) || matches!(args.to, Some(Layout::Gguf | Layout::Mmproj)),
        "--dtype q8_0 and q4_0 are of GGUF files: --to gguf and --to mmproj write one"
    );
    let options = Options::default()
        .with_layout(args.to)
        .with_kind(kind.flatten())
        .with_gguf_kind(args.dtype.map(Dtype::in_gguf))
        .with_max_shard_size(args.max_shard_size)
        .with_hf(args.hf);
    let base = |name: &str| match &args.base {
        Some(base) => Ok(base.clone()),
        None if name.is_empty() => {
            bail!("adapter_config.json names no base_model_name_or_path: --base DIR says which it is")
        }
        None => vora_hub::resolve(name).context("--base DIR says where it lies"),
    };
    let conversion = Conversion::plan(&src, &options, &base)?;
    if !args.dry_run {
        conversion.write(&args.dst)?;
    }
    let (report, mut out) = (conversion.report(), std::io::stdout().lock());
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        print(&mut out, &report, &args.dst, args.dry_run)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The report as tables: tensors, then files.
fn print(out: &mut impl Write, report: &Report, dst: &Path, dry_run: bool) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["", "read", "written", "dtype", "shape"]);
    for tensor in &report.tensors {
        let to = match (tensor.change, &tensor.to) {
            (Change::Kept, _) => "",
            (_, Some(to)) => to,
            (_, None) => tensor.why.unwrap_or_default(),
        };
        let dtype = match tensor.stored_dtype == tensor.dtype {
            true => tensor.dtype.clone(),
            false => format!("{} -> {}", tensor.stored_dtype, tensor.dtype),
        };
        let shape = format!("{:?}", tensor.shape);
        table.add_row([tensor.change.name(), &tensor.from.join("\n"), to, &dtype, &shape]);
    }
    writeln!(out, "{table}")?;
    for change in Change::ALL {
        let of = |found: Change| found == change;
        let tensors = report.tensors.iter().filter(|tensor| of(tensor.change)).count();
        let files: Vec<&str> =
            report.side_files.iter().filter(|file| of(file.change)).map(|file| file.name.as_str()).collect();
        if tensors > 0 || !files.is_empty() {
            let tensors = format!("{tensors} tensors");
            let parts: Vec<&str> = std::iter::once(tensors.as_str()).chain(files).collect();
            writeln!(out, "{}: {}", change.name(), parts.join(", "))?;
        }
    }
    let done = if dry_run { "would write" } else { "written" };
    writeln!(out, "{} ({}) -> {} ({}), {done}:", report.source.display(), report.from, dst.display(), report.to)?;
    for file in &report.files {
        writeln!(out, "  {}  {} tensors, {:.1} MB", file.file, file.tensors, file.bytes as f64 / 1e6)?;
    }
    Ok(())
}
