//! What a key is where a file leaves it out, read from the code that says so.
//!
//! Literals, lists, maps, words of an enum and constants are told as a file would write them. Where the code computes more,
//! the doc comment of the function or constant has to tell.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use syn::{Expr, ExprLit, ImplItem, Item, Lit, Pat, Stmt, UnOp};

use super::declared::Declared;
use super::serde::{Serde, doc};
use super::shape::Shape;
use house::sources::{ModuleId, Sources};

/// A key that a file leaves out.
#[derive(Debug, Clone, PartialEq)]
pub enum Default {
    /// The file is refused.
    Required,
    /// There is none; the key's doc says what that means.
    Absent,
    /// As a file would write it.
    Value(String),
    /// In words.
    Said(String),
    /// A section with the defaults of its own keys.
    Own,
}

/// The fields that a type's `impl Default` sets.
#[derive(Debug, std::default::Default)]
pub struct Defaults {
    /// None where it is derived.
    fields: Option<BTreeMap<String, Default>>,
}

impl Defaults {
    /// That of the field `name`.
    pub fn of(&self, name: &str, shape: &Shape, is_option: bool) -> Default {
        match self.fields.as_ref().and_then(|fields| fields.get(name)) {
            Some(default) => default.clone(),
            None if is_option => Default::Absent,
            None => of_shape(shape),
        }
    }
}

/// What `Default::default` makes of a type.
pub fn of_shape(shape: &Shape) -> Default {
    Default::Value(match shape {
        Shape::Flag => "false".into(),
        Shape::Integer => "0".into(),
        Shape::Number => "0.0".into(),
        Shape::Text | Shape::Path => "\"\"".into(),
        Shape::List(inside, Some(len)) => match of_shape(inside) {
            Default::Value(value) => format!("[{}]", vec![value; len.parse().unwrap_or(0)].join(", ")),
            other => return other,
        },
        Shape::List(_, None) => "[]".into(),
        Shape::Map(..) => "{}".into(),
        Shape::Words(words) => match words.iter().find(|word| word.default) {
            Some(word) => word.name.clone(),
            None => return Default::Required,
        },
        Shape::Section(_) | Shape::Either(_) => return Default::Own,
    })
}

/// What the function of a `default = "path"` returns.
pub fn of_function(sources: &Sources, module: ModuleId, path: &str) -> Result<Default> {
    let declared = Declared::find(sources, module, &syn::parse_str(path)?);
    let Some(Declared { module, item: Item::Fn(function), .. }) = declared else {
        bail!("there is no function `{path}`")
    };
    let said = doc(&function.attrs);
    if !said.is_empty() {
        return Ok(Default::Said(said));
    }
    let locals = BTreeMap::new();
    let value = match &function.block.stmts[..] {
        [Stmt::Expr(value, None)] => Value { sources, module, own: "", locals }.of(value),
        _ => None,
    };
    value.with_context(|| format!("what `{path}` returns is more than a value: say it in its doc comment"))
}

/// The fields of a type's `impl Default`.
pub fn of_type(sources: &Sources, of: &Declared<'_>) -> Result<Defaults> {
    let items = sources.modules[of.module].code.iter();
    let mut bodies = items.filter_map(|item| match item {
        Item::Impl(item) if is(item.trait_.as_ref().map(|(_, path, _)| path)?, "Default") => match &*item.self_ty {
            syn::Type::Path(path) if is(&path.path, of.name) => item.items.iter().find_map(|item| match item {
                ImplItem::Fn(function) => Some(&function.block),
                _ => None,
            }),
            _ => None,
        },
        _ => None,
    });
    let Some(body) = bodies.next() else { return Ok(Defaults::default()) };
    let mut locals = BTreeMap::new();
    for statement in &body.stmts {
        if let Stmt::Local(local) = statement
            && let (Pat::Ident(name), Some(init)) = (&local.pat, &local.init)
        {
            locals.insert(name.ident.to_string(), &*init.expr);
        }
    }
    let Some(Stmt::Expr(Expr::Struct(made), None)) = body.stmts.last() else {
        bail!("the `impl Default` of `{}` does not end in `Self {{ .. }}`", of.name)
    };
    let value = Value { sources, module: of.module, own: of.name, locals };
    let mut fields = BTreeMap::new();
    for field in &made.fields {
        let syn::Member::Named(name) = &field.member else { continue };
        let default = value.of(&field.expr);
        let default = default.with_context(|| format!("the default of `{}.{name}` is more than a value", of.name))?;
        fields.insert(name.to_string(), default);
    }
    Ok(Defaults { fields: Some(fields) })
}

/// A literal as a file would write it.
pub fn literal(value: &Expr) -> Option<String> {
    let Expr::Lit(ExprLit { lit, .. }) = value else { return None };
    match lit {
        Lit::Str(text) => Some(format!("{:?}", text.value())),
        Lit::Int(number) => Some(number.base10_digits().to_owned()),
        Lit::Float(number) => Some(number.base10_digits().to_owned()),
        Lit::Bool(flag) => Some(flag.value.to_string()),
        _ => None,
    }
}

fn is(path: &syn::Path, name: &str) -> bool {
    path.segments.last().is_some_and(|segment| segment.ident == name)
}

/// Expressions of one body.
struct Value<'a> {
    sources: &'a Sources,
    module: ModuleId,
    /// What `Self` is.
    own: &'a str,
    locals: BTreeMap<String, &'a Expr>,
}

impl Value<'_> {
    fn of(&self, value: &Expr) -> Option<Default> {
        match value {
            Expr::Path(path) if path.path.is_ident("None") => Some(Default::Absent),
            Expr::Call(call) => match &*call.func {
                Expr::Path(path) if path.path.is_ident("Some") => self.of(call.args.first()?),
                // `T::default()`; `BTreeMap::new()` and the like are text below.
                Expr::Path(path) if is(&path.path, "default") => Some(Default::Own),
                _ => self.text(value).map(Default::Value),
            },
            Expr::Path(path) => match self.text(value) {
                Some(text) => Some(Default::Value(text)),
                None => match Declared::find(self.sources, self.module, &path.path)?.item {
                    Item::Const(item) => Some(doc(&item.attrs)).filter(|doc| !doc.is_empty()).map(Default::Said),
                    _ => None,
                },
            },
            _ => self.text(value).map(Default::Value),
        }
    }

    fn text(&self, value: &Expr) -> Option<String> {
        let all = |values: &mut dyn Iterator<Item = &Expr>| -> Option<String> {
            let values: Option<Vec<_>> = values.map(|value| self.text(value)).collect();
            Some(values?.join(", "))
        };
        match value {
            Expr::Lit(_) => literal(value),
            Expr::Unary(unary) if matches!(unary.op, UnOp::Neg(_)) => Some(format!("-{}", self.text(&unary.expr)?)),
            Expr::Paren(inside) => self.text(&inside.expr),
            Expr::Array(list) => Some(format!("[{}]", all(&mut list.elems.iter())?)),
            Expr::Macro(call) if is(&call.mac.path, "vec") => {
                let list: syn::ExprArray = syn::parse_str(&format!("[{}]", call.mac.tokens)).ok()?;
                Some(format!("[{}]", all(&mut list.elems.iter())?))
            }
            // A pair of a map.
            Expr::Tuple(pair) => match pair.elems.iter().collect::<Vec<_>>()[..] {
                [key, value] => Some(format!("{}: {}", self.text(key)?, self.text(value)?)),
                _ => None,
            },
            Expr::Call(call) => match &*call.func {
                Expr::Path(path) if is(&path.path, "from") => {
                    let inside = self.text(call.args.first()?)?;
                    Some(format!("{{{}}}", inside.strip_prefix('[')?.strip_suffix(']')?))
                }
                Expr::Path(path) if is(&path.path, "new") && call.args.is_empty() => {
                    let of = path.path.segments.first()?.ident.to_string();
                    Some(match of.as_str() {
                        "String" | "PathBuf" => "\"\"".to_owned(),
                        "Vec" => "[]".to_owned(),
                        _ => "{}".to_owned(),
                    })
                }
                // A variant of an `untagged` enum is what it holds.
                Expr::Path(path) => match Declared::find(self.sources, self.module, &path.path)?.item {
                    Item::Enum(item) if Serde::read(&item.attrs).ok()?.untagged => self.text(call.args.first()?),
                    _ => None,
                },
                _ => None,
            },
            Expr::MethodCall(call) => match call.method.to_string().as_str() {
                "into" | "to_owned" | "to_string" | "to_vec" => self.text(&call.receiver),
                "map" => match call.args.first()? {
                    Expr::Path(path) if is(&path.path, "to_owned") || is(&path.path, "from") => {
                        self.text(&call.receiver)
                    }
                    _ => None,
                },
                _ => None,
            },
            Expr::Path(path) => self.name(&path.path),
            _ => None,
        }
    }

    /// A local, a constant or a word of an enum.
    fn name(&self, path: &syn::Path) -> Option<String> {
        let last = path.segments.last()?.ident.to_string();
        if let Some(local) = path.get_ident().and_then(|name| self.locals.get(&name.to_string())) {
            return self.text(local);
        }
        let own: syn::Path; // where the path begins with `Self`
        let path = match path.segments.first() {
            Some(first) if first.ident == "Self" => {
                own = syn::parse_str(&format!("{}::{last}", self.own)).ok()?;
                &own
            }
            _ => path,
        };
        let declared = Declared::find(self.sources, self.module, path)?;
        match declared.item {
            Item::Const(item) => Value { module: declared.module, locals: BTreeMap::new(), ..*self }.text(&item.expr),
            Item::Enum(item) => {
                // An import may have given the variant another name: `use Kind::{A as B}`.
                let import = self.sources.import_of(self.module, &last).filter(|_| path.segments.len() == 1);
                let variant = import.and_then(|import| import.path.names.last().cloned()).unwrap_or(last);
                let variant = item.variants.iter().find(|known| known.ident == variant)?;
                let container = Serde::read(&item.attrs).ok()?;
                let said = Serde::read(&variant.attrs).ok()?;
                Some(said.name(&variant.ident.to_string(), container.rename_all.as_deref()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use house::small;

    /// What the function `f` returns in a file that holds `code` too.
    fn default(code: &str) -> Result<Default> {
        let text = format!("const N: i64 = 7; /// Every one.\nconst ALL: i64 = i64::MAX; {code}");
        let sources = small::sources(&[("one/lib.rs", &text)]);
        of_function(&sources, 0, "f")
    }

    #[test]
    fn values_are_told_as_a_file_writes_them() {
        let value = |body: &str| match default(&format!("fn f() -> X {{ {body} }}")).unwrap() {
            Default::Value(text) => text,
            other => panic!("{body}: {other:?}"),
        };
        for (body, text) in [
            ("-1", "-1"),
            ("2e-4", "2e-4"),
            ("true", "true"),
            ("N", "7"),
            ("\"a\\nb\".into()", "\"a\\nb\""),
            ("vec![1, 2]", "[1, 2]"),
            ("[0.5, 1.0]", "[0.5, 1.0]"),
            ("String::new()", "\"\""),
            ("BTreeMap::from([(\"a\", 1.0), (\"b\", 2.5)])", "{\"a\": 1.0, \"b\": 2.5}"),
            ("Some(3)", "3"),
        ] {
            assert_eq!(value(body), text, "{body}");
        }
        let words = "#[serde(rename_all = \"snake_case\")] enum Kind { HowMany, B } use Kind::HowMany as Ask;";
        for body in ["Kind::HowMany", "Ask"] {
            let found = default(&format!("{words} fn f() -> Kind {{ {body} }}")).unwrap();
            assert_eq!(found, Default::Value("how_many".into()));
        }
        assert_eq!(default("fn f() -> X { None }").unwrap(), Default::Absent);
    }

    #[test]
    fn what_is_computed_is_said_in_words() {
        assert_eq!(default("fn f() -> i64 { ALL }").unwrap(), Default::Said("Every one.".into()));
        assert_eq!(default("/// As many.\nfn f() -> i64 { g() + 1 }").unwrap(), Default::Said("As many.".into()));
        let error = default("fn f() -> i64 { g() + 1 }").unwrap_err().to_string();
        assert!(error.contains("say it in its doc comment"), "{error}");
    }

    #[test]
    fn an_impl_may_name_what_it_sets_first() {
        let code = "struct S { a: [String; 2], b: Option<u8>, c: u8 }
            impl Default for S { fn default() -> Self { let a = [\"x\", \"y\"]; Self { a: a.map(str::to_owned), b: None, c: N } } }
            const N: u8 = 3;";
        let sources = small::sources(&[("one/lib.rs", code)]);
        let of = Declared::find(&sources, 0, &syn::parse_str("S").unwrap()).unwrap();
        let defaults = of_type(&sources, &of).unwrap();
        let of = |name: &str| defaults.of(name, &Shape::Integer, false);
        assert_eq!(of("a"), Default::Value("[\"x\", \"y\"]".into()));
        assert_eq!((of("b"), of("c")), (Default::Absent, Default::Value("3".into())));
        assert_eq!(of("d"), Default::Value("0".into()));
        let three = Shape::List(Box::new(Shape::Integer), Some("3".into()));
        assert_eq!(of_shape(&three), Default::Value("[0, 0, 0]".into()));
    }
}
