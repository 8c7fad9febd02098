pub mod consistency;
pub mod coordinator;
pub mod ledger;
pub mod partition;
pub mod protocol;
pub mod shard;
pub mod status;
pub use consistency::Consistency;
#[cfg(test)]
mod tests;
