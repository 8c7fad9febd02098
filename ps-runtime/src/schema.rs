//! The structure of a type as serde sees it: names of structs, fields and variants, and primitive types.
//!
//! A type is read from made-up values, and everything that it asks for is recorded with its place. A
//! sequence has one element, a map has one entry, and each variant of an enum is read in one reading. So
//! two versions of a type that would misread each other's bytes have different schemas, even if their
//! names and sizes are the same. If a type refuses the made-up values, what comes after it stays unknown.
//! Then only name and size are compared for the rest.

use std::any::type_name;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::mem;

use serde::de::value::U32Deserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    SeqAccess, VariantAccess, Visitor,
};

/// How deep values may be nested. A recursive type that does not end is refused here.
const MAX_DEPTH: usize = 64;

/// How often a type is recorded inside itself. More than once, because `Result`s may be nested.
const MAX_NESTED: usize = 2;

/// The largest number of places in a type, and of readings of it.
const MAX_NOTES: usize = 1 << 14;
const MAX_READINGS: usize = 1 << 10;

thread_local! {
    static IS_TRACING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread reads made-up values. References and buffers are then empty.
pub(crate) fn is_tracing() -> bool {
    IS_TRACING.get()
}

/// A hash of the structure of types. It is the same in each build with the same types, on any host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schema(u64);

impl Schema {
    /// FNV-1a, 64 bit: <http://www.isthe.com/chongo/tech/comp/fnv/>.
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn write(&mut self, text: &str) {
        // No text contains this byte, so it marks the end of each text.
        for byte in text.bytes().chain([0xff]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Adds a type. Returns `false` if a part of it is known by name and size only.
    pub(crate) fn add<T: DeserializeOwned>(&mut self) -> bool {
        self.write(type_name::<T>());
        let mut notes = BTreeMap::new();
        // Some types refuse zeros, others refuse everything else.
        let is_traced = [0, 1]
            .into_iter()
            .any(|number| trace::<T>(number, &mut notes));
        for (place, note) in notes {
            self.write(&format!("{place:?} {note}"));
        }
        if !is_traced {
            self.write(&format!("{} bytes", mem::size_of::<T>()));
        }
        is_traced
    }

    pub(crate) fn finish(self) -> u64 {
        self.0
    }
}

/// A place in a type: the path of field, element and variant numbers to it.
type Place = Vec<u32>;

/// A struct or enum: its name, and those of its fields or variants.
type Container = (&'static str, &'static [&'static str]);

/// Reads a `T` until all variants of all enums were read. Returns `false` if the type refuses.
fn trace<T: DeserializeOwned>(number: u8, notes: &mut BTreeMap<Place, String>) -> bool {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_TRACING.set(self.0);
        }
    }
    let _restore = Restore(IS_TRACING.replace(true));
    let mut trace = Trace {
        number,
        notes: mem::take(notes),
        ..Trace::default()
    };
    let mut is_traced = true;
    let mut is_over = false;
    for _ in 0..MAX_READINGS {
        trace.is_incomplete = false;
        trace.has_advanced = false;
        let is_read = T::deserialize(Tracer(&mut trace)).is_ok();
        is_traced &= is_read;
        is_over = match is_read {
            true => !trace.is_incomplete,
            false => !trace.has_advanced,
        };
        if is_over {
            break;
        }
    }
    *notes = trace.notes;
    is_traced && is_over
}

#[derive(Default)]
struct Trace {
    /// The made-up value of every number.
    number: u8,
    notes: BTreeMap<Place, String>,
    place: Place,
    /// The structs and enums around this place.
    containers: Vec<Container>,
    enums: BTreeMap<Place, Variants>,
    /// Whether an enum that was met in this reading has variants that were not read.
    is_incomplete: bool,
    /// Whether this reading has failed and the next one will read something else.
    has_advanced: bool,
}

/// What is known about the enum at a place.
#[derive(Clone, Copy, Default)]
struct Variants {
    /// How many variants were read, with everything in them.
    num_read: u32,
    /// A variant that did not refuse.
    sound: u32,
}

impl Trace {
    /// By how many levels the nesting of this place's struct or enum in itself exceeds the limit. If it is 0,
    /// the place is recorded.
    fn num_repeats(&self) -> usize {
        let Some((last, others)) = self.containers.split_last() else {
            return 0;
        };
        let outer = others.iter().filter(|other| *other == last).count();
        outer.saturating_sub(MAX_NESTED)
    }

    fn note(&mut self, what: impl fmt::Display) -> Result<(), Refused> {
        if self.notes.len() >= MAX_NOTES || self.place.len() >= MAX_DEPTH {
            return Err(Refused);
        }
        if self.num_repeats() == 0 && !self.notes.contains_key(&self.place) {
            self.notes.insert(self.place.clone(), what.to_string());
        }
        Ok(())
    }

    /// Reads what is inside this place.
    fn inside<R>(&mut self, number: u32, read: impl FnOnce(Tracer<'_>) -> R) -> R {
        self.place.push(number);
        let result = read(Tracer(self));
        self.place.pop();
        result
    }

    /// Reads a struct or enum.
    fn container<R>(&mut self, container: Container, read: impl FnOnce(&mut Self) -> R) -> R {
        self.containers.push(container);
        let result = read(self);
        self.containers.pop();
        result
    }

    fn elements(&mut self, len: usize) -> Elements<'_> {
        Elements {
            trace: self,
            next: 0,
            len: u32::try_from(len).unwrap_or(u32::MAX),
        }
    }

    /// How many elements a sequence has: one, which shows the type of the elements, or none if the nesting
    /// exceeds the limit.
    fn num_elements(&self) -> usize {
        usize::from(self.num_repeats() == 0)
    }

    /// Reads the next variant that was not read yet.
    fn variant<'de, V: Visitor<'de>>(
        &mut self,
        num_variants: u32,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        if num_variants == 0 {
            return Err(Refused);
        }
        let repeats = u32::try_from(self.num_repeats()).unwrap_or(u32::MAX);
        if repeats > 0 {
            // Not always the same variant, because only some variants end the recursion.
            let index = repeats % num_variants;
            return visitor.visit_enum(Variant { trace: self, index });
        }
        let place = self.place.clone();
        let mut known = self.enums.get(&place).copied().unwrap_or_default();
        let index = match known.num_read < num_variants {
            true => known.num_read,
            false => known.sound,
        };
        let is_incomplete = mem::replace(&mut self.is_incomplete, false);
        let result = visitor.visit_enum(Variant { trace: self, index });
        let is_read = match result {
            Ok(_) => !self.is_incomplete,
            Err(_) => !self.has_advanced,
        };
        if result.is_ok() {
            known.sound = index;
        }
        if is_read && known.num_read < num_variants {
            known.num_read += 1;
            self.has_advanced |= result.is_err();
        }
        self.is_incomplete |= is_incomplete || known.num_read < num_variants;
        self.enums.insert(place, known);
        result
    }
}

/// Makes up values.
struct Tracer<'a>(&'a mut Trace);

/// The type refuses the made-up values, or is too large.
#[derive(Debug, thiserror::Error)]
#[error("the type cannot be read from made-up values")]
struct Refused;

impl serde::de::Error for Refused {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

macro_rules! numbers {
    ($($method:ident, $visit:ident, $number:ty;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
            self.0.note(stringify!($number))?;
            visitor.$visit(self.0.number as $number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Refused;

    numbers! {
        deserialize_i8, visit_i8, i8;
        deserialize_i16, visit_i16, i16;
        deserialize_i32, visit_i32, i32;
        deserialize_i64, visit_i64, i64;
        deserialize_i128, visit_i128, i128;
        deserialize_u8, visit_u8, u8;
        deserialize_u16, visit_u16, u16;
        deserialize_u32, visit_u32, u32;
        deserialize_u64, visit_u64, u64;
        deserialize_u128, visit_u128, u128;
        deserialize_f32, visit_f32, f32;
        deserialize_f64, visit_f64, f64;
        deserialize_char, visit_char, char;
    }

    /// The same as for the wire format: some types have another form in texts.
    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        // The wire format does not say what comes next either.
        Err(Refused)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        Err(Refused)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        Err(Refused)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("bool")?;
        visitor.visit_bool(self.0.number == 1)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("str")?;
        visitor.visit_str("")
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("bytes")?;
        visitor.visit_bytes(&[])
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("option")?;
        match self.0.num_repeats() {
            0 => self.0.inside(0, |inner| visitor.visit_some(inner)),
            _ => visitor.visit_none(),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("unit")?;
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("struct {name}"))?;
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("struct {name}(_)"))?;
        self.0.container((name, &[]), |trace| {
            trace.inside(0, |inner| visitor.visit_newtype_struct(inner))
        })
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("seq")?;
        let len = self.0.num_elements();
        visitor.visit_seq(self.0.elements(len))
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("tuple of {len}"))?;
        visitor.visit_seq(self.0.elements(len))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("struct {name} of {len}"))?;
        self.0
            .container((name, &[]), |trace| visitor.visit_seq(trace.elements(len)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.0.note("map")?;
        // An entry is two elements.
        let len = 2 * self.0.num_elements();
        visitor.visit_map(self.0.elements(len))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("struct {name} {fields:?}"))?;
        self.0.container((name, fields), |trace| {
            visitor.visit_seq(trace.elements(fields.len()))
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.0.note(format_args!("enum {name} {variants:?}"))?;
        let num_variants = u32::try_from(variants.len()).unwrap_or(u32::MAX);
        self.0.container((name, variants), |trace| {
            trace.variant(num_variants, visitor)
        })
    }
}

/// The elements of a sequence, the fields of a struct, or key and value of a map's entry.
struct Elements<'a> {
    trace: &'a mut Trace,
    next: u32,
    len: u32,
}

impl Elements<'_> {
    fn next<'de, S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Refused> {
        if self.next == self.len {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        let value = self.trace.inside(number, |inner| seed.deserialize(inner));
        value.map(Some)
    }
}

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Refused;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Refused> {
        self.next(seed)
    }
}

impl<'de> MapAccess<'de> for Elements<'_> {
    type Error = Refused;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Refused> {
        self.next(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Refused> {
        self.next(seed)?.ok_or(Refused)
    }
}

/// One variant of an enum.
struct Variant<'a> {
    trace: &'a mut Trace,
    index: u32,
}

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Refused;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Refused> {
        let index: U32Deserializer<Refused> = self.index.into_deserializer();
        Ok((seed.deserialize(index)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Refused;

    fn unit_variant(self) -> Result<(), Refused> {
        self.trace.inside(self.index, |inner| inner.0.note("unit"))
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Refused> {
        self.trace.inside(self.index, |inner| {
            inner.0.note("newtype")?;
            inner.0.inside(0, |inner| seed.deserialize(inner))
        })
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Refused> {
        self.trace.inside(self.index, |inner| {
            inner.0.note(format_args!("tuple of {len}"))?;
            visitor.visit_seq(inner.0.elements(len))
        })
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.trace.inside(self.index, |inner| {
            inner.0.note(format_args!("struct {fields:?}"))?;
            visitor.visit_seq(inner.0.elements(fields.len()))
        })
    }
}

#[cfg(test)]
mod tests;
