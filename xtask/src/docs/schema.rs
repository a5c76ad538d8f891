//! What a file may hold, from the types that serde reads it into.
//!
//! Structs, enums of words, `untagged` enums and enums with a `tag` are followed through every crate; whatever else a
//! type does to be read (`deserialize_with`, an `impl` by hand) its doc comment has to say.

use anyhow::{Context, Result, bail, ensure};
use syn::{Attribute, Fields, FieldsNamed, GenericArgument, Item, ItemEnum, PathArguments, Type};

use super::declared::Declared;
use super::default::{self, Default, Defaults};
use super::serde::{Serde, doc};
use super::shape::{Shape, Word};
use house::sources::{ModuleId, Sources};

/// A file's sections, the outermost first, each once.
#[derive(Debug, PartialEq)]
pub struct Schema {
    pub sections: Vec<Section>,
}

/// A mapping with keys of its own.
#[derive(Debug, PartialEq)]
pub struct Section {
    /// The type, which tells one section from another.
    pub of: String,
    pub doc: String,
    pub keys: Vec<Key>,
    /// Of an enum with a tag: each value of the tag, and the keys that come with it.
    pub variants: Vec<Variant>,
}

#[derive(Debug, PartialEq)]
pub struct Variant {
    pub tag: String,
    pub name: String,
    pub doc: String,
    pub keys: Vec<Key>,
}

#[derive(Debug, PartialEq)]
pub struct Key {
    pub name: String,
    pub aliases: Vec<String>,
    pub shape: Shape,
    pub default: Default,
    pub doc: String,
}

/// Reads the type that `root` names: a crate, and a path in it.
pub fn read(sources: &Sources, root: (&str, &str)) -> Result<Schema> {
    let of = |module: &ModuleId| sources.modules[*module].name == root.0;
    let module = sources.roots.iter().map(|root| root.module).find(of);
    let module = module.with_context(|| format!("there is no crate `{}`", root.0))?;
    let mut reader = Reader { sources, schema: Schema { sections: Vec::new() } };
    reader.named(module, &syn::parse_str(root.1)?)?;
    Ok(reader.schema)
}

struct Reader<'a> {
    sources: &'a Sources,
    schema: Schema,
}

impl Reader<'_> {
    /// What stands under a key of this type, and whether the key may be left out.
    fn of(&mut self, module: ModuleId, of: &Type) -> Result<(Shape, bool)> {
        if let Some([inside]) = generic(of, &["Option"]).as_deref() {
            return Ok((self.shape(module, inside)?, true));
        }
        Ok((self.shape(module, of)?, false))
    }

    fn shape(&mut self, module: ModuleId, of: &Type) -> Result<Shape> {
        if let Type::Array(array) = of {
            let len = default::literal(&array.len).context("a list has a length that is no number")?;
            return Ok(Shape::List(Box::new(self.shape(module, &array.elem)?), Some(len)));
        }
        if let Some([inside]) = generic(of, &["Vec"]).as_deref() {
            return Ok(Shape::List(Box::new(self.shape(module, inside)?), None));
        }
        if let Some([inside]) = generic(of, &["Box", "Option"]).as_deref() {
            return self.shape(module, inside);
        }
        if let Some([key, value]) = generic(of, &["BTreeMap", "HashMap"]).as_deref() {
            return Ok(Shape::Map(Box::new(self.shape(module, key)?), Box::new(self.shape(module, value)?)));
        }
        let Type::Path(path) = of else { bail!("a key's type is not a path, a list or a map") };
        self.named(module, &path.path)
    }

    fn named(&mut self, module: ModuleId, path: &syn::Path) -> Result<Shape> {
        let name = path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default();
        match name.as_str() {
            "bool" => return Ok(Shape::Flag),
            "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => {
                return Ok(Shape::Integer);
            }
            "f32" | "f64" => return Ok(Shape::Number),
            "String" => return Ok(Shape::Text),
            "PathBuf" => return Ok(Shape::Path),
            _ => {}
        }
        let declared =
            Declared::find(self.sources, module, path).with_context(|| format!("there is no type `{name}` here"))?;
        match declared.item {
            Item::Struct(item) => match &item.fields {
                Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                    self.shape(declared.module, &fields.unnamed[0].ty)
                }
                Fields::Named(fields) => self.section(&declared, &item.attrs, |reader, container| {
                    let defaults =
                        container.default.is_some().then(|| default::of_type(reader.sources, &declared)).transpose()?;
                    Ok((reader.keys(declared.module, fields, container, defaults.as_ref())?, Vec::new()))
                }),
                _ => bail!("`{name}` is a struct without named fields"),
            },
            Item::Enum(item) => self.choice(&declared, item),
            _ => bail!("`{name}` is neither a struct nor an enum"),
        }
        .with_context(|| format!("in `{name}`"))
    }

    fn section(
        &mut self,
        declared: &Declared<'_>,
        attributes: &[Attribute],
        read: impl FnOnce(&mut Self, &Serde) -> Result<(Vec<Key>, Vec<Variant>)>,
    ) -> Result<Shape> {
        let of = declared.path(self.sources);
        if !self.schema.sections.iter().any(|section| section.of == of) {
            // It takes its place before those that are found inside it.
            let at = self.schema.sections.len();
            let doc = doc(attributes);
            self.schema.sections.push(Section { of: of.clone(), doc, keys: Vec::new(), variants: Vec::new() });
            let (keys, variants) = read(self, &Serde::read(attributes)?)?;
            (self.schema.sections[at].keys, self.schema.sections[at].variants) = (keys, variants);
        }
        Ok(Shape::Section(of))
    }

    fn keys(
        &mut self,
        module: ModuleId,
        fields: &FieldsNamed,
        container: &Serde,
        defaults: Option<&Defaults>,
    ) -> Result<Vec<Key>> {
        let mut keys = Vec::new();
        for field in &fields.named {
            let ident = field.ident.as_ref().map(ToString::to_string).unwrap_or_default();
            let said = Serde::read(&field.attrs)?;
            if said.skip {
                continue;
            }
            let (shape, is_option) = self.of(module, &field.ty).with_context(|| format!("at `{ident}`"))?;
            if let (true, Shape::Section(of)) = (said.flatten, &shape) {
                let at = self.schema.sections.iter().position(|section| section.of == *of);
                let inside = at.map(|at| self.schema.sections.remove(at)).context("it is flattened twice")?;
                ensure!(
                    inside.variants.is_empty(),
                    "`{ident}` flattens an enum with a tag, which has no keys of its own"
                );
                keys.extend(inside.keys);
                continue;
            }
            let default = match (&said.default, defaults) {
                (Some(Some(path)), _) => default::of_function(self.sources, module, path)?,
                (Some(None), _) if is_option => Default::Absent,
                (Some(None), _) => default::of_shape(&shape),
                (None, Some(defaults)) => defaults.of(&ident, &shape, is_option),
                (None, None) if is_option => Default::Absent,
                (None, None) => Default::Required,
            };
            let name = said.name(&ident, container.rename_all.as_deref());
            keys.push(Key { name, aliases: said.aliases, shape, default, doc: doc(&field.attrs) });
        }
        Ok(keys)
    }

    fn choice(&mut self, declared: &Declared<'_>, item: &ItemEnum) -> Result<Shape> {
        let container = Serde::read(&item.attrs)?;
        let mut variants = Vec::new();
        for variant in &item.variants {
            let said = Serde::read(&variant.attrs)?;
            if !said.skip {
                variants.push((said.name(&variant.ident.to_string(), container.rename_all.as_deref()), variant));
            }
        }
        if variants.iter().all(|(_, variant)| variant.fields.is_empty()) {
            let word = |(name, variant): (String, &syn::Variant)| {
                let default = variant.attrs.iter().any(|attribute| attribute.path().is_ident("default"));
                Word { name, doc: doc(&variant.attrs), default }
            };
            return Ok(Shape::Words(variants.into_iter().map(word).collect()));
        }
        if container.untagged {
            let shape = |(_, variant): (_, &syn::Variant)| match &variant.fields {
                Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                    self.shape(declared.module, &fields.unnamed[0].ty)
                }
                _ => bail!("an untagged variant holds one type"),
            };
            return Ok(Shape::Either(variants.into_iter().map(shape).collect::<Result<_>>()?));
        }
        let tag = container.tag.context("an enum that holds more than words needs a `tag`, or is `untagged`")?;
        self.section(declared, &item.attrs, |reader, container| {
            let mut found = Vec::new();
            for (name, variant) in variants {
                let keys = match &variant.fields {
                    Fields::Unit => Vec::new(),
                    Fields::Named(fields) => {
                        let own = Serde { rename_all: None, ..Serde::read(&variant.attrs)? };
                        reader.keys(declared.module, fields, &own, None)?
                    }
                    Fields::Unnamed(fields) => {
                        let ty = &fields.unnamed.first().context("a variant with a tag holds one type")?.ty;
                        let Shape::Section(of) = reader.shape(declared.module, ty)? else {
                            bail!("`{}` holds no keys", variant.ident)
                        };
                        let at = reader.schema.sections.iter().position(|section| section.of == of);
                        at.map(|at| reader.schema.sections.remove(at).keys).context("it is held by two variants")?
                    }
                };
                found.push(Variant { tag: tag.clone(), name, doc: doc(&variant.attrs), keys });
            }
            let _ = container;
            Ok((Vec::new(), found))
        })
    }
}

/// The types in the angle brackets of one of the types called `names`.
fn generic<'t>(of: &'t Type, names: &[&str]) -> Option<Vec<&'t Type>> {
    let Type::Path(path) = of else { return None };
    let last = path.path.segments.last()?;
    let PathArguments::AngleBracketed(inside) = &last.arguments else { return None };
    let types = inside.args.iter().filter_map(|argument| match argument {
        GenericArgument::Type(inside) => Some(inside),
        _ => None,
    });
    names.contains(&last.ident.to_string().as_str()).then(|| types.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use house::small;

    fn schema(code: &str) -> Result<Schema> {
        let sources = small::sources(&[
            ("one/lib.rs", code),
            ("two/lib.rs", "mod deep; pub use deep::Colour;"),
            (
                "two/deep.rs",
                "#[serde(rename_all = \"lowercase\")] pub enum Colour { /// Like grass.\n #[default] Green, Red, #[serde(skip)] Own }",
            ),
        ]);
        read(&sources, ("one", "Root"))
    }

    #[test]
    fn types_are_followed_through_crates() {
        let schema = schema(
            "use two::Colour;
            /// All.\nstruct Root { /// First.\n a: u32, b: Option<Vec<Colour>>, #[serde(default)] c: Colour, d: BTreeMap<String, Inner> }
            /// In it.\n#[serde(default)] struct Inner { #[serde(rename = \"type\", alias = \"t\")] x: [u8; 3], y: Either }
            impl Default for Inner { fn default() -> Self { Self { x: [1, 2, 3], y: Either::One(0.5) } } }
            #[serde(untagged)] enum Either { One(f64), Many(Vec<String>) }",
        )
        .unwrap();
        let [root, inner] = &schema.sections[..] else { panic!("{schema:?}") };
        assert_eq!((root.of.as_str(), root.doc.as_str(), inner.doc.as_str()), ("one::Root", "All.", "In it."));
        let [a, b, c, d] = &root.keys[..] else { panic!("{root:?}") };
        assert_eq!((&a.shape, &a.default, a.doc.as_str()), (&Shape::Integer, &Default::Required, "First."));
        let green = Word { name: "green".into(), doc: "Like grass.".into(), default: true };
        let red = Word { name: "red".into(), doc: String::new(), default: false };
        let words = Shape::Words(vec![green, red]);
        assert_eq!((&b.shape, &b.default), (&Shape::List(Box::new(words.clone()), None), &Default::Absent));
        assert_eq!((&c.shape, &c.default), (&words, &Default::Value("green".into())));
        assert_eq!(d.shape, Shape::Map(Box::new(Shape::Text), Box::new(Shape::Section("one::Inner".into()))));
        let [x, y] = &inner.keys[..] else { panic!("{inner:?}") };
        assert_eq!((x.name.as_str(), &x.aliases[..]), ("type", &["t".to_owned()][..]));
        assert_eq!(x.default, Default::Value("[1, 2, 3]".into()));
        assert_eq!(y.default, Default::Value("0.5".into()));
        assert_eq!(y.shape, Shape::Either(vec![Shape::Number, Shape::List(Box::new(Shape::Text), None)]));
    }

    #[test]
    fn an_enum_with_a_tag_is_one_section_of_several_lists() {
        let schema = schema(
            "struct Root { model: Model }
            #[serde(tag = \"type\", rename_all = \"lowercase\")] enum Model { /// By adapters.\n Vora(Vora), Plain { width: u8 } }
            struct Vora { #[serde(flatten)] common: Common, patch_size: i64 }
            struct Common { llm: String }",
        )
        .unwrap();
        let [_, model] = &schema.sections[..] else { panic!("{schema:?}") };
        let names = |variant: &Variant| variant.keys.iter().map(|key| key.name.clone()).collect::<Vec<_>>().join(" ");
        let found: Vec<_> = model.variants.iter().map(|v| (v.name.as_str(), v.doc.as_str(), names(v))).collect();
        assert_eq!(found, [("vora", "By adapters.", "llm patch_size".into()), ("plain", "", "width".into())]);
        assert_eq!(model.variants[0].tag, "type");
    }

    #[test]
    fn what_cannot_be_followed_is_told() {
        let error = |code: &str| format!("{:#}", schema(code).unwrap_err());
        assert!(error("struct Root { a: Missing }").contains("at `a`: there is no type `Missing` here"));
        assert!(error("struct Root { a: E } enum E { A, B(u8) }").contains("needs a `tag`"));
    }
}
