//! Writes numbers that may be NaN or infinite, which JSON has no words for: as the texts `NaN`, `Infinity`
//! and `-Infinity`. Python's `float` and JavaScript's `Number` read them.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

/// A number that this module writes.
pub(super) trait Number: Copy {
    fn from_f64(number: f64) -> Self;
    fn is_finite(self) -> bool;
    fn to_f64(self) -> f64;
    fn write<S: Serializer>(self, serializer: S) -> Result<S::Ok, S::Error>;
}

impl Number for f64 {
    fn from_f64(number: f64) -> Self {
        number
    }

    fn is_finite(self) -> bool {
        Self::is_finite(self)
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn write<S: Serializer>(self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self)
    }
}

impl Number for f32 {
    fn from_f64(number: f64) -> Self {
        number as Self
    }

    fn is_finite(self) -> bool {
        Self::is_finite(self)
    }

    fn to_f64(self) -> f64 {
        self.into()
    }

    fn write<S: Serializer>(self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f32(self)
    }
}

pub(super) fn serialize<N: Number, S: Serializer>(
    number: &N,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if number.is_finite() {
        return number.write(serializer);
    }
    serializer.serialize_str(match number.to_f64() {
        number if number.is_nan() => "NaN",
        number if number > 0.0 => "Infinity",
        _ => "-Infinity",
    })
}

pub(super) fn deserialize<'de, N: Number, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<N, D::Error> {
    deserializer.deserialize_any(Reader).map(N::from_f64)
}

struct Reader;

impl Visitor<'_> for Reader {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, \"NaN\", \"Infinity\" or \"-Infinity\"")
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<f64, E> {
        Ok(number)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<f64, E> {
        Ok(number as f64)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<f64, E> {
        Ok(number as f64)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
        match text {
            "NaN" => Ok(f64::NAN),
            "Infinity" => Ok(f64::INFINITY),
            "-Infinity" => Ok(f64::NEG_INFINITY),
            other => Err(E::custom(format!("{other:?} is not a number"))),
        }
    }
}

/// The same for the values of a map.
pub(super) mod map {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Value(#[serde(with = "super")] f64);

    pub(crate) fn serialize<S: Serializer>(
        numbers: &BTreeMap<String, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(numbers.iter().map(|(name, &number)| (name, Value(number))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let values = BTreeMap::<String, Value>::deserialize(deserializer)?;
        Ok(values
            .into_iter()
            .map(|(name, Value(number))| (name, number))
            .collect())
    }
}
