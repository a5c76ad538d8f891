//! Parquet files as the hub has them: a row is a record, its images structs of `bytes` and `path`.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::basic::{ConvertedType, LogicalType, Type as PhysicalType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::entry::{Entry, Shard, Take};
use super::frames::{is_picture_key, picture_keys};
use super::keys::RecordKeys;
use super::limits::{MAX_LINE, MAX_RECORD};
use super::preference;
use super::record::Record;

/// No row group is larger, uncompressed: 4 GiB.
const MAX_ROW_GROUP: i64 = 4 << 30;

/// A column of a row group that is larger once it is unpacked, 512 MiB, is refused where it is so many times as large as
/// packed: a few pages of that would fill the memory. Pictures hardly pack, and text by a fifth.
const MAX_UNPACKED: i64 = 512 << 20;
const MOST_UNPACKED: i64 = 32;

/// Columns of words, beside the key of conversations.
const WORDS: [&str; 4] = ["messages", "texts", "caption", "text"];

/// Columns of videos, which are refused where they are not empty.
const VIDEOS: [&str; 2] = ["videos", "video"];

/// One row group of a parquet file.
pub(crate) struct RowGroup {
    path: PathBuf,
    keys: RecordKeys,
    group: usize,
    first: u64, // row of the file
    rows: u64,
}

/// The row groups of a file, by its footer.
pub(crate) fn row_groups(path: &Path, keys: &RecordKeys) -> Result<Vec<RowGroup>> {
    let groups = || {
        let reader = open(path)?;
        let schema = reader.metadata().file_metadata().schema();
        let columns: Vec<_> = schema.get_fields().iter().map(|field| field.name()).collect();
        ensure!(
            columns.iter().any(|name| *name == keys.conversations || WORDS.contains(name) || *name == "chosen"),
            "it has no column `{}`, {}, `chosen`; its columns are {}",
            keys.conversations,
            WORDS.map(|name| format!("`{name}`")).join(", "),
            columns.join(", ")
        );
        let taken = |name: &str| picture_keys(keys).contains(&name);
        for field in schema.get_fields() {
            let name = field.name();
            let is_picture = is_picture_key(name) && holds_bytes(field) || is_file(field) && !name.contains("audio");
            if taken(name) || VIDEOS.contains(&name) || !is_picture {
                continue;
            }
            ensure!(
                columns.iter().any(|name| taken(name)),
                "its column `{name}` holds pictures, but they are read from {}; `frames_key: {name}` reads it",
                picture_keys(keys).iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
            );
            tracing::warn!("{}: its column `{name}` is not read", path.display());
        }
        let mut first = 0;
        let group = |(group, metadata): (usize, &parquet::file::metadata::RowGroupMetaData)| {
            let rows = u64::try_from(metadata.num_rows()).context("a row group has a negative number of rows")?;
            ensure!(
                metadata.total_byte_size() <= MAX_ROW_GROUP,
                "row group {group} has more than {} GiB; write it with smaller ones",
                MAX_ROW_GROUP >> 30
            );
            for column in metadata.columns() {
                let (packed, size) = (column.compressed_size(), column.uncompressed_size());
                ensure!(
                    size <= MAX_UNPACKED || size / MOST_UNPACKED <= packed,
                    "column `{}` of row group {group} unpacks to {} MiB from {packed} bytes; write it with smaller row groups",
                    column.column_path().string(),
                    size >> 20
                );
            }
            let group = RowGroup { path: path.to_owned(), keys: keys.clone(), group, first, rows };
            first += rows;
            Ok(group)
        };
        reader.metadata().row_groups().iter().enumerate().map(group).collect()
    };
    // A hostile footer may make the parquet crate panic.
    let groups = catch_unwind(AssertUnwindSafe(groups)).unwrap_or_else(|_| Err(anyhow!("its footer is broken")));
    groups.with_context(|| format!("cannot read {}", path.display()))
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    Ok(SerializedFileReader::new(File::open(path)?)?)
}

impl Shard for RowGroup {
    fn len(&self) -> Option<u64> {
        Some(self.rows)
    }

    fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()> {
        let mut read = || -> Result<()> {
            let reader = open(&self.path)?;
            let schema = reader.metadata().file_metadata().schema();
            let mut wanted: Vec<_> = schema.get_fields().iter().filter(|f| self.is_wanted(f.name())).cloned().collect();
            wanted.dedup();
            let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build()?;
            let group = reader.get_row_group(self.group)?;
            let rows = RowIter::from_row_group(Some(projection), &*group)?;
            for (row, number) in rows.zip(self.first + 1..).skip(usize::try_from(skip)?) {
                if !take(self.entry(row?, number, schema)) {
                    break;
                }
            }
            Ok(())
        };
        read().with_context(|| format!("cannot read {}, row group {}", self.path.display(), self.group))
    }
}

impl RowGroup {
    fn is_wanted(&self, column: &str) -> bool {
        picture_keys(&self.keys).contains(&column)
            || column == "id"
            || column == self.keys.conversations
            || WORDS.contains(&column)
            || preference::KEYS.contains(&column)
            || VIDEOS.contains(&column)
    }

    fn entry(&self, row: Row, number: u64, schema: &Type) -> Result<Entry> {
        let place = format!("{}: row {number}", self.path.display());
        let entry = || -> Result<_> {
            let (mut object, mut images) = (Map::new(), Vec::new());
            let mut of: Option<String> = None; // the column that the images are of
            let mut is_text_only = true;
            for (column, field) in row.into_columns() {
                let shown = || format!("its `{column}`");
                if picture_keys(&self.keys).contains(&column.as_str()) {
                    is_text_only &= matches!(field, Field::Null);
                    let mut found = Vec::new();
                    let mut left = MAX_RECORD;
                    add_images(field, &mut found, &mut left).with_context(shown)?;
                    if !found.is_empty() {
                        if let Some(other) = of {
                            bail!("it has both `{other}` and `{column}`");
                        }
                        (images, of) = (found, Some(column));
                    }
                } else if VIDEOS.contains(&column.as_str()) {
                    object.insert(column, if is_given(&field) { Value::Bool(true) } else { Value::Null });
                } else if column == "id" {
                    object.insert(column, id(field));
                } else {
                    let value = value(field, child(schema, &column)).with_context(shown)?;
                    object.insert(column, value);
                }
            }
            let record = match is_text_only {
                true => Record::of_words(object, &self.keys)?,
                false => Record::with_images(object, &self.keys, images.len())?,
            };
            Ok((record, images))
        };
        let (mut record, images) = entry().with_context(|| place.clone())?;
        if record.id.is_empty() {
            record.id.clone_from(&place);
        }
        Ok(Entry { place, record, images })
    }
}

/// An image, or a list of them: bytes, or a struct with `bytes`; a record may have `left` bytes of them.
fn add_images(field: Field, images: &mut Vec<Vec<u8>>, left: &mut u64) -> Result<()> {
    match field {
        Field::Null => {}
        Field::Bytes(bytes) => {
            let size = bytes.len() as u64;
            ensure!(size <= *left, "a record's images have more than {} MiB", MAX_RECORD >> 20);
            *left -= size;
            images.push(bytes.data().to_vec());
        }
        Field::Group(row) => {
            let bytes = row.into_columns().into_iter().find(|(name, _)| name == "bytes").map(|(_, field)| field);
            match bytes {
                Some(bytes @ Field::Bytes(_)) => add_images(bytes, images, left)?,
                _ => bail!("an image has no bytes, only files that hold their images are read"),
            }
        }
        Field::ListInternal(list) => {
            for element in list.elements() {
                add_images(element.clone(), images, left)?;
            }
        }
        _ => bail!("an image is neither bytes nor a struct of bytes and path"),
    }
    Ok(())
}

/// An id of any type, as text.
fn id(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => bytes.data().iter().map(|byte| format!("{byte:02x}")).collect::<String>().into(),
        },
        other => other.to_string().into(),
    }
}

/// Whether a field says anything.
fn is_given(field: &Field) -> bool {
    match field {
        Field::Null => false,
        Field::ListInternal(list) => list.elements().iter().any(is_given),
        _ => true,
    }
}

/// A value as JSON; `ty` tells strings of JSON from others.
fn value(field: Field, ty: Option<&Type>) -> Result<Value> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float(value) => value.into(),
        Field::Double(value) => value.into(),
        Field::Str(text) => {
            ensure!(text.len() as u64 <= MAX_LINE, "a text has more than {} MiB", MAX_LINE >> 20);
            if ty.is_some_and(is_json) {
                return serde_json::from_str(&text).map_err(|error| anyhow!("a value of JSON is none: {error}"));
            }
            text.into()
        }
        Field::Bytes(bytes) => {
            ensure!(bytes.len() as u64 <= MAX_LINE, "a text has more than {} MiB", MAX_LINE >> 20);
            std::str::from_utf8(bytes.data()).context("a text is bytes, and not UTF-8")?.into()
        }
        Field::Group(row) => {
            let entry = |(name, field): (String, Field)| {
                let value = value(field, ty.and_then(|ty| child(ty, &name)))?;
                Ok((name, value))
            };
            Value::Object(row.into_columns().into_iter().map(entry).collect::<Result<_>>()?)
        }
        Field::ListInternal(list) => {
            let element = ty.map(element);
            list.elements().iter().map(|field| value(field.clone(), element)).collect::<Result<_>>()?
        }
        other => other.to_string().into(),
    })
}

fn child<'a>(ty: &'a Type, name: &str) -> Option<&'a Type> {
    if ty.is_primitive() {
        return None;
    }
    ty.get_fields().iter().find(|field| field.name() == name).map(|field| &**field)
}

/// What a list is of: `list` has one repeated field, which has one field in its turn where it is written in three levels.
fn element(list: &Type) -> &Type {
    let only = |ty: &'_ Type| !ty.is_primitive() && ty.get_fields().len() == 1;
    if !only(list) || list.get_basic_info().converted_type() != ConvertedType::LIST {
        return list;
    }
    let repeated = &*list.get_fields()[0];
    if only(repeated) { &repeated.get_fields()[0] } else { repeated }
}

fn is_json(ty: &Type) -> bool {
    let info = ty.get_basic_info();
    info.logical_type_ref() == Some(&LogicalType::Json) || info.converted_type() == ConvertedType::JSON
}

/// Whether a column is of structs with `bytes` and `path`, or of lists of them, as the hub's files of pictures are.
fn is_file(ty: &Type) -> bool {
    let ty = element(ty);
    child(ty, "bytes").is_some_and(holds_bytes) && child(ty, "path").is_some()
}

/// Whether a column is of bytes, of structs that have some, or of lists of either.
fn holds_bytes(ty: &Type) -> bool {
    if !ty.is_primitive() {
        return ty.get_fields().iter().any(|field| holds_bytes(field));
    }
    ty.get_physical_type() == PhysicalType::BYTE_ARRAY && ty.get_basic_info().converted_type() == ConvertedType::NONE
}
