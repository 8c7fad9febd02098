use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::*;
use crate::codec::{Bulk, BulkValue, CodecError};

/// The schema of a type, without the path of its module, and whether it is complete.
fn of<T: DeserializeOwned>() -> (Vec<String>, bool) {
    let mut notes = BTreeMap::new();
    let is_traced = trace::<T>(0, &mut notes);
    let notes = notes.into_iter();
    let lines = notes.map(|(place, note)| format!("{place:?} {note}"));
    (lines.collect(), is_traced)
}

/// Checks whether two versions of a type with the same name and size have different schemas.
fn check<A: DeserializeOwned, B: DeserializeOwned>(differ: bool) {
    assert_eq!(mem::size_of::<A>(), mem::size_of::<B>());
    let (a, b) = (of::<A>(), of::<B>());
    assert!(a.1 && b.1, "{a:?}\n{b:?}");
    assert_eq!(a != b, differ, "{a:#?}\n{b:#?}");
}

mod old {
    use super::*;

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    pub(super) struct Message {
        pub(super) number: f32,
        pub(super) count: u32,
        pub(super) kind: Kind,
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    pub(super) enum Kind {
        One(u32),
        Two { low: u16, high: u16 },
    }
}

#[test]
fn the_same_fields_have_the_same_schema() {
    mod again {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) struct Message {
            number: f32,
            count: u32,
            kind: old::Kind,
        }
    }
    check::<old::Message, again::Message>(false);
}

#[test]
fn a_number_of_another_type_shows() {
    mod new {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) struct Message {
            number: u32,
            count: u32,
            kind: old::Kind,
        }
    }
    check::<old::Message, new::Message>(true);
}

#[test]
fn fields_that_changed_places_show() {
    mod new {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) struct Message {
            count: u32,
            number: f32,
            kind: old::Kind,
        }
    }
    check::<old::Message, new::Message>(true);
    // Of the same type, their names show it.
    mod swapped {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) enum Kind {
            One(u32),
            Two { high: u16, low: u16 },
        }
    }
    check::<old::Kind, swapped::Kind>(true);
}

#[test]
fn another_variant_and_what_is_in_one_shows() {
    mod more {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) enum Kind {
            One(u32),
            Two { low: u16, high: u16 },
            Three,
        }
    }
    mod other {
        use super::*;

        #[derive(Deserialize)]
        #[expect(dead_code, reason = "only its looks count")]
        pub(super) enum Kind {
            One(u32),
            Two { low: u16, high: i16 },
        }
    }
    check::<old::Kind, more::Kind>(true);
    check::<Vec<old::Kind>, Vec<other::Kind>>(true);
    check::<[Option<Box<old::Kind>>; 2], [Option<Box<other::Kind>>; 2]>(true);
    check::<BTreeMap<u8, old::Kind>, BTreeMap<u8, other::Kind>>(true);
    check::<Result<Result<(), old::Kind>, u8>, Result<Result<(), other::Kind>, u8>>(true);
}

#[test]
fn every_place_of_a_type_is_noted_once() {
    let (notes, is_traced) = of::<(old::Kind, Option<bool>, Arc<str>)>();
    assert!(is_traced);
    let expected = [
        "[] tuple of 3",
        "[0] enum Kind [\"One\", \"Two\"]",
        "[0, 0] newtype",
        "[0, 0, 0] u32",
        "[0, 1] struct [\"low\", \"high\"]",
        "[0, 1, 0] u16",
        "[0, 1, 1] u16",
        "[1] option",
        "[1, 0] bool",
        "[2] str",
    ];
    assert_eq!(notes, expected);
}

#[test]
fn types_of_the_standard_library_are_read() {
    type Many = (
        (Duration, SocketAddr, char, ()),
        (i128, std::ops::Range<usize>, std::path::PathBuf),
    );
    assert!(of::<Many>().1);
}

/// Lists and trees end.
#[test]
fn types_inside_of_themselves_are_read() {
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    struct List {
        next: Option<Box<Self>>,
        value: u8,
    }
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    struct Tree(Vec<Self>);
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    enum Sum {
        Add(Box<Self>, Box<Self>),
        Number(f64),
        List(Vec<Self>),
    }
    assert!(of::<List>().1);
    assert!(of::<Tree>().1);
    assert!(of::<Sum>().1);
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    struct Endless {
        next: Box<Self>,
    }
    assert!(!of::<Endless>().1);
}

/// Refuses whatever it is given.
struct Stubborn;

impl<'de> Deserialize<'de> for Stubborn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u8::deserialize(deserializer)?;
        Err(serde::de::Error::custom("no"))
    }
}

#[test]
fn a_type_that_refuses_is_known_by_what_it_asked_for_and_by_its_size() {
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its looks count")]
    enum Either {
        Stubborn(Stubborn),
        Plain(u16),
    }
    let (notes, is_traced) = of::<(Either, Either)>();
    assert!(!is_traced);
    // What is beside it is seen all the same, and what comes after an enum.
    assert!(notes.contains(&"[0, 1, 0] u16".to_owned()), "{notes:?}");
    assert!(notes.contains(&"[1, 1, 0] u16".to_owned()), "{notes:?}");
    let mut schema = Schema::new();
    assert!(!schema.add::<(u8, Stubborn)>());
    // Not only zeros are tried.
    assert!(schema.add::<NonZeroU32>());
}

/// The value was computed once and must not change: a schema must not depend on the build.
#[test]
fn a_schema_is_the_same_in_every_build() {
    let mut schema = Schema::new();
    schema.add::<(u32, Option<String>)>();
    assert_eq!(schema.finish(), 11_680_610_940_564_820_680);
}

/// The value is beside the header, but two builds must still agree on its type.
#[test]
fn the_type_of_a_value_beside_the_header_is_compared() {
    check::<BulkValue<u32>, BulkValue<i32>>(true);
    check::<BulkValue<Vec<String>>, BulkValue<Vec<String>>>(false);
}

/// A type that reads such a value while it is read itself is traced as a whole.
#[test]
fn a_made_up_value_beside_the_header_can_be_read() {
    #[derive(Deserialize)]
    #[serde(try_from = "BulkValue<(Option<String>, Bulk)>")]
    struct Checked;
    impl TryFrom<BulkValue<(Option<String>, Bulk)>> for Checked {
        type Error = CodecError;

        fn try_from(value: BulkValue<(Option<String>, Bulk)>) -> Result<Self, CodecError> {
            value.read().map(|_| Self)
        }
    }
    let (notes, is_traced) = of::<(Checked, u8)>();
    assert!(is_traced, "{notes:?}");
    assert!(notes.contains(&"[0, 0, 0, 0] str".to_owned()), "{notes:?}");
}
