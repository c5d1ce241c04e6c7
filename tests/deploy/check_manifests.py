"""Checks Kubernetes manifests against the published schemas; unknown fields are errors.

    check_manifests.py CRDS MANIFEST...

CRDS is a folder of custom resource definitions (YAML). The schemas of Kubernetes itself come with the package
kubernetes-validate. tools/check_manifests makes both and runs this. Prints a line for each resource; ends with 1 if one
is wrong.
"""

import pathlib
import sys
from typing import Any, Dict, Iterator, List, Tuple

import jsonschema
import kubernetes_validate
import yaml

Schemas = Dict[Tuple[str, str], Any]


def closed(schema: Any) -> Any:
    """The schema, refusing fields that it does not name, unless it says that it keeps them."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    # A property may have the name "properties": then it is a schema itself, and has a type.
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def custom_schemas(folder: pathlib.Path) -> Schemas:
    """The schemas of the definitions of a folder, by (apiVersion, kind)."""
    found: Schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        for definition in yaml.safe_load_all(path.read_text()):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = closed(version["schema"]["openAPIV3Schema"])
                # Kubernetes checks what every resource has.
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def faults(resource: Any, custom: Schemas) -> Iterator[str]:
    schema = custom.get((resource["apiVersion"], resource["kind"]))
    if schema is not None:
        for error in jsonschema.Draft7Validator(schema).iter_errors(resource):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        return
    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        yield str(getattr(error, "message", error))


def main(arguments: List[str]) -> int:
    custom = custom_schemas(pathlib.Path(arguments[0]))
    wrong = 0
    for name in arguments[1:]:
        resources = list(yaml.safe_load_all(pathlib.Path(name).read_text()))
        if not resources:
            print(f"{name}: has no resource")
            wrong += 1
        for resource in resources:
            found = list(faults(resource, custom))
            wrong += bool(found)
            print(f"{name}: {resource['kind']} {resource['metadata']['name']}: {'; '.join(found) or 'valid'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
