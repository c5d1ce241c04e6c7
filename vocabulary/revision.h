// The commit of this build, for people.

#ifndef SYNCBN_VOCABULARY_REVISION_H_
#define SYNCBN_VOCABULARY_REVISION_H_

namespace syncbn {

// As git describes it, with "-dirty" behind it if files had changed: "1b2c3d4e5f60". Empty where the sources were no
// checkout, and in libraries that are built without --stamp.
extern const char kRevision[];

}  // namespace syncbn

#endif  // SYNCBN_VOCABULARY_REVISION_H_
